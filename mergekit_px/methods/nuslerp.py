"""Spherical interpolation by weights, of models or of their task vectors."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Access, Extent, Params, Sweep, merge_method
from mergekit_px.methods.sphere import cosine_of, dots
from mergekit_px.methods.weighting import total_weight

if TYPE_CHECKING:
    import torch

_STRAIGHT = 1e-6
"""Sine of the angle under which arc and line differ by less than 1e-12 of it."""


class NuslerpParams(Params):
    along: Literal["tensor", "rows", "columns"] = "tensor"
    """What is interpolated: whole tensors, or each vector along the last axis (rows) or along the first (columns)."""


def interpolated_share(weights: Sequence[float]) -> float:
    """How far to go from the first source to the second, from 0 to 1.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    t = weights[1] / total_weight(weights, hint="choose other weights")
    if not 0 <= t <= 1:
        raise UsageError("the weights have different signs", hint="nuslerp goes from one source to the other")
    return t


def nuslerp_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, float] | None]:
    t = interpolated_share(extent.weights)
    if extent.params.along != "tensor":
        return None
    angle = math.acos(cosine_of((yield dots)))
    sine = math.sin(angle)
    if sine < _STRAIGHT:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def nuslerp_cut(params: Any) -> Access | None:
    cuts: dict[str, Access] = {"rows": "rows", "columns": "tensor"}
    return cuts.get(params.along)


def arcs(first: torch.Tensor, second: torch.Tensor, t: float, axis: int) -> torch.Tensor:
    """Each vector along an axis on its own way from one tensor to the other, in fresh memory."""
    import torch

    x, y = first.to(torch.float64), second.to(torch.float64)
    norms = x.square().sum(dim=axis, keepdim=True).sqrt_() * y.square().sum(dim=axis, keepdim=True).sqrt_()
    products = (x * y).sum(dim=axis, keepdim=True)
    cosines = torch.where(norms > 0, products / norms.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    angles = cosines.clamp_(-1, 1).acos_()
    sines = angles.sin()
    straight = sines < _STRAIGHT
    sines = sines.clamp_min(_STRAIGHT)
    left = torch.where(straight, 1 - t, ((1 - t) * angles).sin_() / sines)
    right = torch.where(straight, t, (t * angles).sin_() / sines)
    return (left * x).addcmul_(right, y).to(first.dtype)


def interpolate(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: NuslerpParams,
    factors: tuple[float, float] | None,
) -> torch.Tensor:
    from mergekit_px.kernels.reduction import weighted_sum

    if factors is not None:
        return weighted_sum(tensors, factors)
    return arcs(tensors[0], tensors[1], interpolated_share(weights), -1 if params.along == "rows" else 0)


@merge_method(
    space="weights",
    access="two_pass",
    sources=(2, 2),
    statistics=nuslerp_statistics,
    coarser=nuslerp_cut,
    scratch=12.0,
    weighing=interpolated_share,
)
def nuslerp(
    sources: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: NuslerpParams,
    statistics: tuple[float, float] | None,
) -> torch.Tensor:
    """Spherical interpolation between two models by their weights (NuSLERP).

    ``sin((1 - t) a) / sin(a) * x + sin(t a) / sin(a) * y`` with ``t = w_y / (w_x + w_y)``, where ``a`` is the angle
    between ``x`` and ``y``: the whole tensors, or with ``along`` each pair of rows or columns (Shoemake, SIGGRAPH
    1985). Unlike ``slerp`` it follows the arc down to the smallest angles; only parallel, opposite and zero vectors go
    straight.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    return interpolate(sources, weights, params, statistics)


@merge_method(
    space="deltas",
    access="two_pass",
    sources=(2, 2),
    statistics=nuslerp_statistics,
    coarser=nuslerp_cut,
    scratch=12.0,
    weighing=interpolated_share,
)
def nuslerp_deltas(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: NuslerpParams,
    statistics: tuple[float, float] | None,
) -> torch.Tensor:
    """Base plus the spherical interpolation between two task vectors (NuSLERP).

    The formula of ``nuslerp`` on the differences to the base.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    return interpolate(deltas, weights, params, statistics)
