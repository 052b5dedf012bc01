"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


class TaskArithmeticParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the summed task vectors (lambda); 0 gives the base, negative values forget."""
    normalize: bool = False
    """Divide the weights by their sum."""


@merge_method(space="deltas", access="elementwise", paper="arXiv:2212.04089", scratch=1.0)
def task_arithmetic(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: TaskArithmeticParams
) -> torch.Tensor:
    """Base plus the weighted sum of the task vectors (task arithmetic).

    ``base + scale * sum_i w_i (x_i - base)`` (Ilharco et al., section 2), element by element, whatever the shape.
    A negative weight subtracts the task; with ``normalize`` the weights are first divided by their sum.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    factor = params.scale / total_weight(weights) if params.normalize else params.scale
    return weighted_sum(deltas, [factor * weight for weight in finite_weights(weights)])
