"""Spherical interpolation by weights, of models or of their task vectors."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Extent, Operands, Sweep, merge_method
from mergekit_px.methods.slerp import cosine_of
from mergekit_px.methods.weighting import total_weight

if TYPE_CHECKING:
    import torch

_STRAIGHT = 1e-6
"""Sine of the angle under which arc and line differ by less than 1e-12 of it."""


def _vectors(tensors: Sequence[torch.Tensor], base: torch.Tensor | None) -> Sequence[torch.Tensor]:
    return tensors if base is None else [tensor - base for tensor in tensors]


def nuslerp_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, float]]:
    from mergekit_px.kernels.reduction import gram

    def dots(operands: Operands) -> torch.Tensor:
        return gram(_vectors(operands.tensors, operands.base))

    t = extent.weights[1] / total_weight(extent.weights)
    if not 0 <= t <= 1:
        raise UsageError("the weights have different signs", hint="nuslerp goes from one source to the other")
    angle = math.acos(cosine_of((yield dots)))
    sine = math.sin(angle)
    if sine < _STRAIGHT:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


@merge_method(
    space="weights",
    access="two_pass",
    sources=(2, 2),
    statistics=nuslerp_statistics,
    scratch=8.0,
)
def nuslerp(
    sources: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    weights: Sequence[float],
    statistics: tuple[float, float],
) -> torch.Tensor:
    """Spherical interpolation between two models, or between their task vectors if there is a base.

    ``sin((1 - t) a) / sin(a) * x + sin(t a) / sin(a) * y`` with ``t = w_y / (w_x + w_y)``, where ``x`` and ``y`` are
    the tensors, or the tensors minus the base, which is then added again, and ``a`` is the angle between them as
    whole vectors. Unlike ``slerp`` it follows the arc down to the smallest angles; only parallel, opposite and
    zero vectors go straight.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    merged = weighted_sum(_vectors(sources, base), statistics)
    return merged if base is None else merged.add_(base)
