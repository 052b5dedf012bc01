"""Codes of eight bits with a scale for the tensor, each channel, or each block: value = code * scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergekit_px.storage.encoding import Encoding, ReadPart

if TYPE_CHECKING:
    import torch

_BLOCKS = (128, 64, 32, 16, 256)
"""Sides of blocks that writers use, likeliest first; the last block of an axis may be cut short."""


def block_sides(
    shape: Sequence[int], scales: Sequence[int], declared: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """How many elements of each axis share a scale; None where the two shapes do not fit.

    Args:
        declared: the sides that the config names for the last axes.
    """
    if math.prod(scales) == 1:
        return tuple(shape)
    grid = tuple(scales)
    if len(grid) < len(shape):
        # One scale for each row, or for each matrix of a stack of them.
        grid = (*grid, *[1] * (len(shape) - len(grid)))
    if len(grid) != len(shape):
        return None
    sides = []
    wanted = [None] * (len(shape) - len(declared or ())) + list(declared or ())
    for size, count, side in zip(shape, grid, wanted, strict=False):
        if count == 1:
            sides.append(max(size, 1))
        elif count == size:
            sides.append(1)
        else:
            options = (*([side] if side else []), *_BLOCKS, *([size // count] if count and size % count == 0 else []))
            fitting = next((option for option in options if -(-size // option) == count), None)
            if fitting is None:
                return None
            sides.append(fitting)
    return tuple(sides)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(Encoding):
    """Float or integer codes of one byte, times their scale.

    Attributes:
        sides: elements of each axis that share a scale.
        divisor: what the scales are to be divided by; 127 where they are the largest magnitudes of int8 rows.
    """

    title: ClassVar[str] = "codes of 8 bits with scales"
    sides: tuple[int, ...]
    divisor: float = 1.0

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        inner = self.shape[1:]
        row = math.prod(inner)
        codes = read(self.parts["codes"], begin * row, end * row).to(torch.float32).reshape(end - begin, *inner)
        grid = tuple(-(-size // side) for size, side in zip(self.shape, self.sides, strict=True))
        per_row = math.prod(grid[1:])
        first, last = begin // self.sides[0], -(-end // self.sides[0])
        scales = self.scales(read, "scales", first * per_row, last * per_row).reshape(last - first, *grid[1:])
        scales = scales / self.divisor if self.divisor != 1 else scales
        for axis in range(1, len(self.shape)):
            if grid[axis] not in (1, self.shape[axis]):
                scales = scales.repeat_interleave(self.sides[axis], axis).narrow(axis, 0, self.shape[axis])
        if self.sides[0] == 1:
            return codes.mul_(scales)
        if last - first == 1:
            return codes.mul_(scales)
        for place in range(first, last):
            low = max(place * self.sides[0], begin) - begin
            high = min((place + 1) * self.sides[0], end) - begin
            codes[low:high].mul_(scales[place - first])
        return codes
