"""Spherical interpolation of any number of sources, in the tangent space at their mean."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from mergekit_px.methods.declare import Extent, Params, Sweep, merge_method
from mergekit_px.methods.sphere import Directions, dots
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


_CANCELLED = 1e-8
"""Length of the weighted sum of directions under which it is rounding."""


class MultislerpParams(Params):
    normalize: bool = True
    """Divide the weights by their sum."""


def multislerp_coefficients(gram: torch.Tensor, weights: Sequence[float]) -> tuple[float, ...]:
    """Factors of the sources: one step from their mean direction, drawn out to the weighted sum of their norms."""
    import numpy as np

    directions = Directions(gram)
    shares = np.array(weights)
    size = directions.size(shares)
    if size < _CANCELLED:
        return tuple(weights)
    mean = shares / size
    step = shares - (shares @ directions.cosines(mean)) * mean
    return directions.coefficients(directions.walk(mean, step), float(directions.norms @ shares))


def multislerp_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    divisor = total_weight(extent.weights) if extent.params.normalize else 1.0
    weights = [weight / divisor for weight in finite_weights(extent.weights)]
    return multislerp_coefficients((yield dots), weights)


@merge_method(
    space="weights",
    access="two_pass",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    params=MultislerpParams,
    statistics=multislerp_statistics,
    scratch=8.0,
)
def multislerp(sources: Sequence[torch.Tensor], weights: Sequence[float], statistics: Sequence[float]) -> torch.Tensor:
    """Spherical interpolation of any number of models, in the tangent space at their mean (multi-SLERP).

    With ``u_i = x_i / |x_i|`` and ``m`` the direction of ``sum_i w_i u_i``: ``exp_m(sum_i w_i (u_i - (u_i . m) m))``
    times ``sum_i w_i |x_i|``. Tensors of every shape are taken as one vector each. Where the weighted directions
    cancel there is no mean, and ``sum_i w_i x_i`` takes over.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, statistics)


@merge_method(
    space="deltas",
    access="two_pass",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    params=MultislerpParams,
    statistics=multislerp_statistics,
    scratch=8.0,
)
def multislerp_deltas(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], statistics: Sequence[float]
) -> torch.Tensor:
    """Base plus the spherical interpolation of any number of task vectors (multi-SLERP).

    The formula of ``multislerp`` on the differences to the base.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(deltas, statistics)
