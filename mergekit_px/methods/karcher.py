"""The Karcher mean: the centre of the sources' directions on the sphere."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import Extent, Params, Sweep, merge_method
from mergekit_px.methods.sphere import Directions, dots
from mergekit_px.methods.weighting import shares_of_one

if TYPE_CHECKING:
    import torch


class KarcherParams(Params):
    iterations: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Most steps of the search for the mean."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-9
    """Length of a step, in radians, at which the search ends."""


def karcher_coefficients(
    gram: torch.Tensor, weights: Sequence[float], iterations: int, tolerance: float
) -> tuple[float, ...]:
    """Factors of the sources in their Karcher mean.

    Args:
        gram: dot products of the sources, float64, shape (k, k).
        weights: one for each source, not negative, not all zero.
    """
    import numpy as np

    directions = Directions(gram)
    shares = np.array(weights) / math.fsum(weights)
    length = float(directions.norms @ shares)
    shares = np.where(directions.norms > 0, shares, 0.0)
    if not shares.any():
        return (0.0,) * len(weights)
    shares /= shares.sum()
    mean = shares
    if directions.size(mean) < 1e-6:  # directions that cancel have no centre: begin at the first
        mean = np.eye(len(weights))[np.flatnonzero(shares)[0]]
    mean = mean / directions.size(mean)
    for _ in range(iterations):
        cosines = directions.cosines(mean)
        angles = np.arccos(cosines)
        sines = np.sin(angles)
        # Towards a source at angle 0 the factor is 1; one at the opposite pole pulls in no direction.
        pull = shares * np.divide(angles, sines, out=(cosines > 0).astype(float), where=sines > 1e-6)
        step = pull - (pull @ cosines) * mean
        if directions.size(step) <= tolerance:
            break
        mean = directions.walk(mean, step)
        mean = mean / directions.size(mean)
    return directions.coefficients(mean, length)


def karcher_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    shares_of_one(extent.weights)
    return karcher_coefficients((yield dots), extent.weights, extent.params.iterations, extent.params.tolerance)


@merge_method(
    space="weights",
    access="two_pass",
    paper="doi:10.1002/cpa.3160300502",
    params=KarcherParams,
    statistics=karcher_statistics,
    scratch=8.0,
    weighing=shares_of_one,
)
def karcher(sources: Sequence[torch.Tensor], weights: Sequence[float], statistics: Sequence[float]) -> torch.Tensor:
    """Karcher (Riemannian) mean of the models on the sphere, at the mean of their norms.

    The point ``m`` of the unit sphere with the least ``sum_i w_i angle(m, x_i / |x_i|)^2``, times
    ``sum_i w_i |x_i| / sum_i w_i`` (Karcher, 1977); with two sources of equal weight it is the middle of the arc.
    Found by the fixed point ``m <- exp_m(sum_i w_i log_m(x_i / |x_i|))``, begun at the mean of the directions.

    Tensors of every shape are taken as one vector each; a zero tensor has no direction and only lowers the norm.

    Raises:
        UsageError: a weight is negative or not finite, or all are zero.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, statistics)
