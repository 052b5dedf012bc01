"""FedNova: averaging of fine-tunes that were trained for different lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Params, PerSource, merge_method
from mergekit_px.methods.pruning import per_source
from mergekit_px.methods.weighting import shares_of_one

if TYPE_CHECKING:
    import torch

Steps = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FednovaParams(Params):
    steps: Annotated[Steps | tuple[Steps, ...], PerSource()] = 1.0
    """Optimiser steps that each source was trained for; only their ratios matter."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


@merge_method(
    family="federated",
    space="deltas",
    access="elementwise",
    paper="arXiv:2007.07481",
    scratch=1.0,
    weighing=shares_of_one,
)
def fednova(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: FednovaParams) -> torch.Tensor:
    """Average of the task vectors, normalised by the number of training steps (FedNova).

    ``base + scale * (sum_i p_i s_i) * sum_i p_i d_i / s_i`` with ``p_i = w_i / sum_k w_k`` and ``s_i`` the steps of
    source i (Wang et al., for plain SGD), element by element, whatever the shape. Sources that were
    trained longer do not count for more. The weights are the sources' numbers of examples; with equal ones this is
    the form of arXiv:2411.18607, and with equal steps the plain average.

    Raises:
        UsageError: the weights add up to zero, one is negative or not finite, or steps are given for another number
            of sources.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    shares = shares_of_one(weights)
    steps = per_source(params.steps, len(deltas))
    mean_steps = math.fsum(share * count for share, count in zip(shares, steps, strict=True))
    factors = [params.scale * share * (mean_steps / count) for share, count in zip(shares, steps, strict=True)]
    return weighted_sum(deltas, factors)
