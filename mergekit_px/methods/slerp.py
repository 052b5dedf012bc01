"""Spherical linear interpolation."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import Extent, Params, Sweep, merge_method
from mergekit_px.methods.sphere import cosine_of, dots

if TYPE_CHECKING:
    import torch

NEARLY_PARALLEL = 0.9995
"""Magnitude of the cosine above which straight lines are used: the sine of the angle becomes too small."""


class SlerpParams(Params):
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Position between the first source (0) and the second (1)."""


def slerp_coefficients(t: float, cosine: float) -> tuple[float, float]:
    """Factors of the two ends at position ``t`` of the arc between them; those of the straight line where the
    ends are nearly parallel or nearly antiparallel."""
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, float]]:
    t = extent.params.t
    if t in (0, 1):
        return 1 - t, t
    return slerp_coefficients(t, cosine_of((yield dots)))


@merge_method(
    space="weights",
    access="two_pass",
    sources=(2, 2),
    params=SlerpParams,
    statistics=slerp_statistics,
    scratch=6.0,
)
def slerp(sources: Sequence[torch.Tensor], statistics: tuple[float, float]) -> torch.Tensor:
    """Spherical interpolation between two models (SLERP).

    ``sin((1 - t) a) / sin(a) * x + sin(t a) / sin(a) * y``, where ``a`` is the angle between the whole tensors
    ``x`` and ``y`` (Shoemake, SIGGRAPH 1985). The angle is that of the directions, the combination is of the
    tensors themselves, so their norms are interpolated as well. Tensors of every shape are taken as one vector each.

    Straight-line interpolation takes over where the arc is not defined or numerically void: nearly parallel or
    nearly antiparallel tensors (magnitude of the cosine above 0.9995) and zero tensors. Fine-tunes of one base
    are nearly parallel as a rule, and exactly opposite tensors give zero in the middle.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, statistics)
