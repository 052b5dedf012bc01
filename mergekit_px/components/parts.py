"""Where the components of a tensor's matrices stand in its ``U``, ``S`` and ``V``.

A tensor that is cut into blocks of rows has the components of all blocks side by side; the left vectors of a block
are zero outside its rows, so the product of the factors is the tensor still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import UsageError
from mergekit_px.methods.matrices import component_count, cut_into_matrices
from mergekit_px.methods.svd import SvdParams


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a tensor: rows ``[top, bottom)``, components ``[left, right)``, of which at most ``limit``."""

    label: str
    top: int
    bottom: int
    left: int
    right: int
    limit: int

    @property
    def width(self) -> int:
        return self.right - self.left

    def rows(self, tensor: Tensor) -> Tensor:
        """The part's matrix of a tensor."""
        return tensor.reshape(tensor.shape[0], -1)[self.top : self.bottom]


def parts_of(shape: tuple[int, ...], name: str, params: SvdParams, sources: int) -> list[Part]:
    """The parts of a tensor; none where it is merged by the mean.

    A part has room for as many components as it keeps of so many sources of full rank.

    Raises:
        UsageError: a stack of matrices along the first axis, whose components have no such form, or a split that
            does not fit.
    """
    views = cut_into_matrices(shape, name, params)
    if views is None:
        return []
    # Shapes only: nothing is allocated.
    blocks = [view(torch.empty(shape, device="meta")).shape for view in views]
    if sum(rows for rows, _ in blocks) != shape[0]:
        raise UsageError(
            f"{shown(name)} is a stack of matrices, which has no components as one matrix",
            hint="--stack flatten, or write a checkpoint",
        )
    parts: list[Part] = []
    top = left = 0
    for number, (rows, columns) in enumerate(blocks):
        rank = min(rows, columns)
        limit = component_count(params.top_k, rank)
        width = min(limit, sources * rank)
        label = name if len(blocks) == 1 else f"{name}[{number}]"
        parts.append(Part(label, top, top + rows, left, left + width, limit))
        top, left = top + rows, left + width
    return parts
