"""Consensus task arithmetic: leave out what matters to one task only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Params, merge_method
from mergekit_px.methods.weighting import finite_weights

if TYPE_CHECKING:
    import torch


class ConsensusTaParams(Params):
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.4
    """How large a task's own change must be, relative to what the others change there, to matter to it (lambda)."""
    tasks: Annotated[int, Field(ge=0)] = 2
    """To how many tasks an element must matter to be merged."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (alpha)."""


@merge_method(
    space="deltas", access="elementwise", paper="arXiv:2405.07813", sources=(2, None), default_weight=0.3, scratch=8.0
)
def consensus_ta(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: ConsensusTaParams) -> torch.Tensor:
    """Task arithmetic without the elements that fewer than ``tasks`` sources need (TALL masks, Consensus TA).

    With the sum ``m = sum_i w_i d_i``, an element matters to source i where ``|d_i| > threshold * |m - d_i|`` (Wang et
    al., equations 3 and 4). Elements that matter to ``tasks`` sources or more become those of ``base + scale * m``;
    catastrophic ones, which matter to none, and selfish ones, to one, stay as they are in the base. Element by
    element, whatever the shape.

    Raises:
        UsageError: a weight is not finite.
    """
    import torch

    from mergekit_px.kernels.reduction import weighted_sum

    merged = weighted_sum(deltas, finite_weights(weights))
    needed = torch.zeros_like(merged)
    for delta in deltas:
        needed += delta.abs() > (merged - delta).abs_().mul_(params.threshold)
    return merged.mul_(needed >= params.tasks).mul_(params.scale)
