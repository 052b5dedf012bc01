"""Where the components of a tensor's matrices stand in its ``U``, ``S`` and ``V``.

A tensor that is cut into blocks of rows has the components of all blocks side by side; the left vectors of a block
are zero outside its rows, so the product of the factors is the tensor still. A stack of matrices has a stack of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.methods.matrices import component_count, cut_into_matrices
from mergekit_px.methods.svd import SvdParams


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a tensor: rows ``[top, bottom)``, components ``[left, right)``, of which at most ``limit``.

    Attributes:
        place: of a stack, which of its matrices the rows are of.
    """

    label: str
    place: int | None
    top: int
    bottom: int
    left: int
    right: int
    limit: int

    @property
    def width(self) -> int:
        return self.right - self.left

    def held(self, count: int) -> slice:
        """Columns of the first ``count`` components."""
        return slice(self.left, self.left + count)

    def of(self, factor: Tensor) -> Tensor:
        """The factor, or of a stack of factors the one of the part's matrix."""
        return factor if self.place is None else factor[self.place]

    def rows(self, tensor: Tensor) -> Tensor:
        """The part's matrix of a tensor."""
        matrix = tensor.reshape(tensor.shape[0], -1) if self.place is None else tensor[self.place]
        return matrix[self.top : self.bottom]


def parts_of(shape: tuple[int, ...], name: str, params: SvdParams, sources: int) -> list[Part]:
    """The parts of a tensor; none where it is merged by the mean.

    A part has room for as many components as it keeps of so many sources of full rank.

    Raises:
        UsageError: a split that does not fit.
    """
    views = cut_into_matrices(shape, name, params)
    if views is None:
        return []
    # Shapes only: nothing is allocated.
    blocks = [view(torch.empty(shape, device="meta")).shape for view in views]
    stacked = sum(rows for rows, _ in blocks) != shape[0]
    height = shape[1] if stacked else shape[0]
    parts: list[Part] = []
    top = left = place = 0
    for number, (rows, columns) in enumerate(blocks):
        if top == height:
            top, left, place = 0, 0, place + 1
        rank = min(rows, columns)
        limit = component_count(params.top_k, rank)
        width = min(limit, sources * rank)
        label = name if len(blocks) == 1 else f"{name}[{number}]"
        parts.append(Part(label, place if stacked else None, top, top + rows, left, left + width, limit))
        top, left = top + rows, left + width
    return parts


def factor_shapes(shape: tuple[int, ...], parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """The shapes of ``U``, ``S`` and ``V`` of a tensor that has parts."""
    width = parts[-1].right
    if parts[-1].place is None:
        return {"U": (shape[0], width), "S": (width,), "V": (math.prod(shape[1:]), width)}
    stack, rows, columns = shape
    return {"U": (stack, rows, width), "S": (stack, width), "V": (stack, columns, width)}
