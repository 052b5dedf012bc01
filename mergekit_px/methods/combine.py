"""Linear combination: the arithmetic of adding, subtracting, negating, scaling and analogies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.weighting import finite_weights

if TYPE_CHECKING:
    import torch


@merge_method(
    family="building block", space="any", access="elementwise", paper="arXiv:2212.04089", scratch=1.0, signed=True
)
def combine(sources: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Linear combination of the sources with the weights as they are.

    ``sum_i w_i x_i``, element by element, whatever the shape. What comes out depends on the sources and weights:
    task vectors give a task vector; full checkpoints whose weights add up to 1 give a full checkpoint (an
    analogy is ``C + B - A``), those whose weights add up to 0 give a task vector (``fine-tuned - base``); a full
    checkpoint of weight 1 plus task vectors of any weights is a full checkpoint.

    Raises:
        UsageError: a weight is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, finite_weights(weights))
