"""Gradient-masked averaging: an average that is damped where the sources disagree about the sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Params, merge_method
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


class FedgmaParams(Params):
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Elements whose signs agree at least so much are kept whole; the others are multiplied with their agreement."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    normalize: bool = True
    """Divide the weights by their sum."""


@merge_method(family="federated", space="deltas", access="elementwise", paper="arXiv:2201.11986", scratch=4.0)
def fedgma(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: FedgmaParams) -> torch.Tensor:
    """Average of the task vectors, damped where the sources disagree in sign (FedGMA, gradient masking).

    ``base + scale * m * sum_i w_i d_i / sum_i w_i`` with ``m = 1`` where ``s >= agreement`` and ``m = s`` elsewhere,
    ``s = |mean_i sign(d_i)|`` (Tenison et al.), element by element, whatever the shape. A zero is no vote.
    Without ``normalize`` the task vectors are summed, which is the form of arXiv:2411.18607.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    import torch

    from mergekit_px.kernels.reduction import weighted_sum

    factor = params.scale / total_weight(weights) if params.normalize else params.scale
    votes = torch.sign(deltas[0])
    for delta in deltas[1:]:
        votes.add_(torch.sign(delta))
    votes.abs_().div_(len(deltas))
    mask = torch.where(votes >= params.agreement, 1.0, votes)
    return weighted_sum(deltas, [factor * weight for weight in finite_weights(weights)]).mul_(mask)
