"""Spherical interpolation by weights, of models or of their task vectors."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Extent, Sweep, merge_method
from mergekit_px.methods.sphere import cosine_of, dots
from mergekit_px.methods.weighting import total_weight

if TYPE_CHECKING:
    import torch

_STRAIGHT = 1e-6
"""Sine of the angle under which arc and line differ by less than 1e-12 of it."""


def nuslerp_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, float]]:
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
    scratch=6.0,
)
def nuslerp(sources: Sequence[torch.Tensor], weights: Sequence[float], statistics: tuple[float, float]) -> torch.Tensor:
    """Spherical interpolation between two models, as far as their weights say.

    ``sin((1 - t) a) / sin(a) * x + sin(t a) / sin(a) * y`` with ``t = w_y / (w_x + w_y)``, where ``a`` is the angle
    between the whole tensors ``x`` and ``y`` (Shoemake, SIGGRAPH 1985). Unlike ``slerp`` it follows the arc down to
    the smallest angles; only parallel, opposite and zero tensors go straight.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, statistics)


@merge_method(
    space="deltas",
    access="two_pass",
    sources=(2, 2),
    statistics=nuslerp_statistics,
    scratch=6.0,
)
def nuslerp_deltas(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], statistics: tuple[float, float]
) -> torch.Tensor:
    """Base plus the spherical interpolation between two task vectors.

    The formula of ``nuslerp`` on the differences to the base.

    Raises:
        UsageError: the weights have different signs, add up to zero, or are not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(deltas, statistics)
