"""Coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class MedianParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


@merge_method(family="federated", space="deltas", access="elementwise", paper="arXiv:1803.01498", scratch=16.0)
def median(deltas: Sequence[torch.Tensor], params: MedianParams) -> torch.Tensor:
    """Element-wise median of the task vectors.

    ``base + scale * median_i d_i`` (Yin et al., definition 1; for one-shot federated merging arXiv:2411.18607),
    element by element, whatever the shape. Of an even number of sources the mean of the two in the middle is taken.
    Fewer than half of the sources, however wrong, cannot move an element beyond the values of the others.
    """
    import torch

    ordered = torch.stack(list(deltas)).sort(dim=0).values
    middle = len(deltas) // 2
    chosen = ordered[middle] if len(deltas) % 2 else (ordered[middle - 1] + ordered[middle]).div_(2)
    return chosen * params.scale
