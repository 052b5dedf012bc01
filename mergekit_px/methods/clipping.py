"""Centred clipping: no source moves the average further than the others do."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


class ClippingParams(Params):
    level: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Where the radius lies between the smallest norm of a task vector (0) and the largest (1)."""
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Norm to which longer task vectors are shortened; left out, ``level`` decides."""
    norm_scope: Literal["model", "tensor"] = "model"
    """Whether a task vector's norm is taken over all merged tensors together, as in the paper, or over each alone."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    normalize: bool = True
    """Divide the weights by their sum."""


def clipping_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """What each task vector is multiplied with: 1, or what shortens it to the radius."""
    from mergekit_px.kernels.reduction import element_sum

    def squares(operands: Operands) -> torch.Tensor:
        import torch

        return torch.stack([element_sum(tensor.to(torch.float64).square()) for tensor in operands.tensors])

    norms = [math.sqrt(total) for total in (yield squares).tolist()]
    radius = extent.params.radius
    if radius is None:
        radius = min(norms) + extent.params.level * (max(norms) - min(norms))
    return tuple(min(1.0, radius / norm) if norm > 0 else 1.0 for norm in norms)


def clipping_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.norm_scope
    return scope


@merge_method(
    family="federated",
    space="deltas",
    access="two_pass",
    paper="arXiv:2012.10333",
    statistics=clipping_statistics,
    scope=clipping_scope,
    scratch=3.0,
)
def clipping(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: ClippingParams, statistics: Sequence[float]
) -> torch.Tensor:
    """Average of the task vectors, each limited to a norm (norm clipping of federated learning).

    ``base + scale * sum_i w_i d_i min(1, radius / ||d_i||) / sum_i w_i`` (Karimireddy et al., one round
    around the base), whatever the shape. Without ``normalize`` the clipped task vectors are summed, which is the form
    of arXiv:2411.18607, where the radius is searched between the smallest norm and the largest: ``level``.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    factor = params.scale / total_weight(weights) if params.normalize else params.scale
    pairs = zip(finite_weights(weights), statistics, strict=True)
    return weighted_sum(deltas, [factor * weight * clipped for weight, clipped in pairs])
