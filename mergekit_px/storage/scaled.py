"""Codes of eight bits with a scale for the tensor, each channel, or each block: value = code * scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.storage.encoding import MX_BIAS, Encodable, Encoding, ReadPart

if TYPE_CHECKING:
    import torch

    Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
ReadBytes = Callable[[StoredTensor, int, int], Bytes]
"""Gives the bytes of the elements [start, stop) of a stored tensor."""

_PLAIN_SCALES: dict[str, Callable[[Bytes], np.ndarray[Any, Any]]] = {
    "F32": lambda held: held.view(np.float32),
    "F16": lambda held: held.view(np.float16),
    "BF16": lambda held: (held.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F8_E8M0": lambda held: np.where(held == 255, np.nan, np.ldexp(np.float64(1), held.astype(int) - MX_BIAS)),
}
"""Storage types of scales -> their values, without torch."""

_INT8 = 127.0
"""The largest code of symmetric integers: -128 has no counterpart."""

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
            # A side of its own is only believed where scales lie as the codes do, not of a shorter list.
            other = [size // count] if count and size % count == 0 and len(scales) == len(shape) else []
            options = (*([side] if side else []), *_BLOCKS, *other)
            fitting = next((option for option in options if -(-size // option) == count), None)
            if fitting is None:
                return None
            sides.append(fitting)
    return tuple(sides)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scaled(Encoding):
    """Codes with a grid of scales over them.

    Attributes:
        sides: elements of each axis that share a scale.
        divisor: what the scales are to be divided by; 127 where they are the largest magnitudes of int8 rows.
    """

    sides: tuple[int, ...]
    divisor: float = 1.0

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        spans, inner = self.spans(begin, end), self.shape[1:]
        codes = read(self.parts["codes"], *spans["codes"]).to(torch.float32).reshape(end - begin, *inner)
        if "zeros" in self.parts:
            zeros = read(self.parts["zeros"], *spans["scales"]).to(torch.float32).reshape(-1, *self._grid[1:])
            codes = self._by_groups(torch.Tensor.sub_, codes, zeros, begin)
        scales = self.scales(read, "scales", *spans["scales"]).reshape(-1, *self._grid[1:])
        return self._by_groups(torch.Tensor.mul_, codes, scales / self.divisor if self.divisor != 1 else scales, begin)

    def spans(self, begin: int, end: int) -> dict[str, tuple[int, int]]:
        """Role -> the elements of the stored tensor that rows [begin, end) are in."""
        row, per_group = math.prod(self.shape[1:]), math.prod(self._grid[1:])
        first, last = begin // self.sides[0], -(-end // self.sides[0])
        return {"codes": (begin * row, end * row), "scales": (first * per_group, last * per_group)}

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(-(-size // side) for size, side in zip(self.shape, self.sides, strict=True))

    def vector_scales(self, read: ReadBytes, begin: int, end: int, lanes: int) -> Floats | None:
        """The scale of each vector of ``lanes`` elements among [begin, end), which are whole vectors.

        None where vectors do not lie within blocks, or a scale is not positive and finite.
        """
        part, row = self.parts["scales"], self.shape[-1] if self.shape else 1
        within = row % lanes == 0 and (self._grid[-1] == 1 or self.sides[-1] % lanes == 0)
        if not within or part.dtype.name not in _PLAIN_SCALES:
            return None
        lists = np.arange(begin // row, -(-end // row))  # of scales along the last axis, for each row
        rest, places, stride = lists, np.zeros_like(lists), 1
        for size, side, count in zip(self.shape[-2::-1], self.sides[-2::-1], self._grid[-2::-1], strict=True):
            places += rest % size // side * stride
            rest, stride = rest // size, stride * count
        first, count = int(places.min()), self._grid[-1]
        held = read(part, first * count, (int(places.max()) + 1) * count)
        with np.errstate(over="ignore"):
            scales = _PLAIN_SCALES[part.dtype.name](held).astype(np.float32).reshape(-1, count)
        if not (np.isfinite(scales) & (scales > 0)).all():
            return None
        if self.divisor != 1:
            scales /= np.float32(self.divisor)
        each = row // lanes if count == 1 else self.sides[-1] // lanes
        spread = np.repeat(scales, each, axis=1)[:, : row // lanes][places - first].reshape(-1)
        skipped = begin % row // lanes
        return np.ascontiguousarray(spread[skipped : skipped + (end - begin) // lanes])

    def _by_groups(self, change: Change, values: torch.Tensor, groups: torch.Tensor, begin: int) -> torch.Tensor:
        """Rows from ``begin`` on, each changed by what its group has."""
        for axis in range(1, len(self.shape)):
            if self._grid[axis] not in (1, self.shape[axis]):
                groups = groups.repeat_interleave(self.sides[axis], axis).narrow(axis, 0, self.shape[axis])
        side, end = self.sides[0], begin + len(values)
        if side == 1 or len(groups) == 1:
            return change(values, groups)
        for place in range(len(groups)):
            group = begin // side + place
            low, high = max(group * side, begin) - begin, min((group + 1) * side, end) - begin
            change(values[low:high], groups[place])
        return values


class ScaledFromZeros(_Scaled):
    """Integer codes of one byte from a zero point on, times their scale."""

    title: ClassVar[str] = "codes of 8 bits with scales and zero points"


class Mxfp8(_Scaled):
    """Float codes of one byte in blocks with powers of two for scales, that are kept as plain bytes."""

    title: ClassVar[str] = "MXFP8"


class Scaled(_Scaled, Encodable):
    """Float or integer codes of one byte, times their scale."""

    title: ClassVar[str] = "codes of 8 bits with scales"

    @property
    def joint_rows(self) -> int:
        return self.sides[0]

    def largest(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        import torch

        found = rows.abs()
        for axis in range(1, len(self.shape)):
            found = _grouped_largest(found, axis, self.sides[axis], 0)
        return _grouped_largest(found, 0, self.sides[0], begin % self.sides[0]).to(torch.float32)

    def encoded(self, rows: torch.Tensor, begin: int, largest: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        codes = self.parts["codes"].dtype
        limit = codes.max_finite or _INT8
        scales = self._stored_scales(largest / limit * self.divisor)
        values = rows.to(torch.float32, copy=True)
        values = self._by_groups(torch.Tensor.div_, values, scales.to(torch.float32) / self.divisor, begin)
        values = values if codes.kind == "float" else values.round_()
        return {"codes": values.clamp_(-limit, limit).to(codes.torch).reshape(-1), "scales": scales.reshape(-1)}

    def _stored_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales in their dtype: of zeros one, and none so small that it would be zero itself."""
        import torch

        stored = self.parts["scales"].dtype
        if stored.name == "F8_E8M0":
            # The next power of two, so that no code is beyond the largest.
            fraction, exponent = torch.frexp(scales)
            powers = (exponent - (fraction == 0.5).int()).clamp(-MX_BIAS, MX_BIAS)
            powers = torch.where(scales > 0, powers, torch.zeros_like(powers))
            return (powers + MX_BIAS).to(torch.uint8).view(stored.torch)
        bounds = torch.finfo(stored.torch)
        scales = torch.where(scales > 0, scales.clamp(min=bounds.tiny), torch.ones_like(scales))
        if bool((scales > bounds.max).any()):
            raise self.error(f"a scale of {float(scales.max()):g} does not fit {stored.name}, the dtype of its scales")
        return scales.to(stored.torch)


def _grouped_largest(values: torch.Tensor, axis: int, side: int, ahead: int) -> torch.Tensor:
    """The largest of each ``side`` values along an axis; the first of them has ``ahead`` fewer."""
    import torch

    if side == 1:
        return values
    size = values.shape[axis]
    if ahead + size <= side:
        return values.amax(axis, keepdim=True)
    missing = -(ahead + size) % side
    if ahead or missing:
        shape = list(values.shape)
        zeros = [values.new_zeros([*shape[:axis], count, *shape[axis + 1 :]]) for count in (ahead, missing)]
        values = torch.cat([zeros[0], values, zeros[1]], axis)
    groups = (*values.shape[:axis], -1, side, *values.shape[axis + 1 :])
    return values.reshape(groups).amax(axis + 1)
