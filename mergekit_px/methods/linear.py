"""Weighted averaging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mergekit_px.methods.declare import Params, merge_method
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


class LinearParams(Params):
    normalize: bool = True
    """Divide the weights by their sum."""
    precision: Literal["float32", "float64"] = "float32"
    """Of the sum, before its one rounding into the storage type. float64 keeps a sum of hundreds of sources exact to
    the last digit of float32; it is always used where a source is float64."""


@merge_method(space="any", access="elementwise", paper="arXiv:2203.05482", scratch=1.0)
def linear(sources: Sequence[torch.Tensor], weights: Sequence[float], params: LinearParams) -> torch.Tensor:
    """Weighted average of the sources (a model soup).

    ``sum_i w_i x_i / sum_i w_i``, or without the division if ``normalize`` is off. With equal weights this is the
    uniform soup of Wortsman et al. (section 2).

    Tensors of every shape are treated alike, element by element. Full checkpoints give a full checkpoint, task
    vectors a task vector, provided that the weights are normalised or add up to 1.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    divisor = total_weight(weights) if params.normalize else 1.0
    return weighted_sum(sources, [weight / divisor for weight in finite_weights(weights)])
