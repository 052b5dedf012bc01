"""MagMax: of each element the change that is largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class MagmaxParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


@merge_method(space="deltas", access="elementwise", paper="arXiv:2407.06322", scratch=4.0)
def magmax(deltas: Sequence[torch.Tensor], params: MagmaxParams) -> torch.Tensor:
    """For each parameter keep the change of largest magnitude (MagMax).

    ``base + scale * d_k`` with ``k = argmax_i |d_i|`` in each element (Marczak et al., section 4), whatever the
    shape. Of two opposite values of the same magnitude the positive one is taken.
    """
    import torch

    largest = deltas[0].clone()
    least = deltas[0].clone()
    for index in range(1, len(deltas)):
        delta = deltas[index]
        torch.maximum(largest, delta, out=largest)
        torch.minimum(least, delta, out=least)
    upper = (largest + least).sign_().add_(0.5).sign_().add_(1).mul_(params.scale / 2)
    # `upper` is the factor of the largest, what it lacks is that of the least: one of them is 0.
    return largest.mul_(upper).add_(least.mul_(upper.neg_().add_(params.scale)))
