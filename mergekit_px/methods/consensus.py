"""Sign election and disjoint merge, the second half of TIES, which several methods end with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, adds_up
from mergekit_px.methods.weighting import finite_weights

if TYPE_CHECKING:
    import torch


class ConsensusParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    vote: Literal["sum", "count"] = "sum"
    """What elects the sign of an element: the sum of the values, or one vote for each nonzero value."""
    weighted_vote: bool = True
    """Whether the weights apply before the vote. If not, they apply to the values that agree with it."""
    tie: Literal["zero", "positive"] = "zero"
    """What wins where the votes cancel: neither sign (the merged element is 0), or the positive one."""
    divide_by: Literal["weights", "count", "nothing"] = "weights"
    """What the sum of the agreeing values is divided by: the sum of their weights, their number, or nothing.
    With weights of 1 the first two are the mean of the paper."""


MERGEKIT = {"tie": "positive"}
PEFT = {"tie": "positive", "weighted_vote": False, "divide_by": "count"}


def divided_twice(params: Any) -> str | None:
    """What a method does that rescales what it keeps at random, and then takes the mean of what was kept."""
    shares = params.density if isinstance(params.density, tuple) else (params.density,)
    twice = params.rescale in ("density", "probability") and min(shares) < 1 and params.divide_by != "nothing"
    return "divides what it keeps by its share and again by its number" if twice else adds_up(params)


def merge_by_consensus(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: ConsensusParams,
    *,
    cuts: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
) -> torch.Tensor:
    """Elect signs, then sum or average the values that have them (arXiv:2306.01708, section 3.2).

    Args:
        deltas: task vectors, one block of each, equal in shape and dtype.
        weights: one for each.
        cuts: magnitudes up to which each counts as zero; None for no trimming.
        factors: what each is multiplied with before everything else; None for 1.

    Raises:
        UsageError: a weight is not finite.
    """
    from mergekit_px.kernels.signs import disjoint_sum, elect_signs

    count = len(deltas)
    cuts = cuts or (0.0,) * count
    factors = factors or (1.0,) * count
    scaled = [weight * factor for weight, factor in zip(finite_weights(weights), factors, strict=True)]
    signs = elect_signs(deltas, scaled if params.weighted_vote else factors, cuts, vote=params.vote, tie=params.tie)
    orientations = [math.copysign(1.0, w) if w else 0.0 for w in weights] if params.weighted_vote else [1.0] * count
    shares = {"weights": weights, "count": (1.0,) * count, "nothing": None}[params.divide_by]
    merged = disjoint_sum(deltas, signs, scaled, cuts, orientations=orientations, shares=shares)
    return merged if params.scale == 1 else merged.mul_(params.scale)
