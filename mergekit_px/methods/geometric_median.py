"""The geometric median of the sources."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.weighting import shares_of_one

if TYPE_CHECKING:
    import torch

_NEAR = 1e-12
"""A distance, relative to the largest between two sources, at which the median is at a source."""


class GeometricMedianParams(Params):
    distance_scope: Literal["model", "tensor"] = "model"
    """Whether distances are those of all merged tensors together, or of each alone, which then has its own median."""
    iterations: Annotated[int, Field(ge=0, le=10_000)] = 1000
    """Most steps of the search for the median."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-10
    """How little a step changes the shares of the sources when the search ends."""


def squared_distances(operands: Operands) -> torch.Tensor:
    """A sweep: the squared distances of all pairs of sources, float64, shape (k, k)."""
    import torch

    from mergekit_px.kernels.reduction import element_sum

    doubles = [tensor.to(torch.float64) for tensor in operands.tensors]
    found = torch.zeros(len(doubles), len(doubles), dtype=torch.float64, device=doubles[0].device)
    for row, left in enumerate(doubles):
        for column in range(row):
            found[row, column] = found[column, row] = element_sum((left - doubles[column]).square_())
    return found


def median_shares(
    distances: torch.Tensor, weights: Sequence[float], iterations: int, tolerance: float
) -> tuple[float, ...]:
    """The shares of the sources in their geometric median; they add up to 1.

    A point with shares ``c`` has from source i the squared distance ``(D c)_i - c'Dc / 2``, so that the squared
    distances ``D`` of the sources are all that Weiszfeld's iteration needs. Where it would come to stand on a source,
    it goes on by the rule of Vardi and Zhang (2000).
    """
    import numpy as np

    squares = distances.numpy()
    pull = np.array(weights, dtype=np.float64)
    shares = pull / pull.sum()
    largest = float(np.sqrt(squares.max(initial=0.0)))
    if largest == 0:
        return tuple(shares.tolist())
    for _ in range(iterations):
        lengths = np.sqrt(np.maximum(squares @ shares - shares @ squares @ shares / 2, 0.0))
        here = lengths <= _NEAR * largest
        factors = np.where(here, 0.0, pull / np.where(here, 1.0, lengths))
        if not factors.any():
            break
        target = factors / factors.sum()
        if here.any():  # the force of all others against the weight of the sources that it stands on
            step = target - shares
            size = float(np.sqrt(max(-step @ squares @ step / 2, 0.0)))
            force = factors.sum() * size
            held = float(pull[here].sum())
            if force <= held:
                break
            target = shares + (1 - held / force) * step
        moved = float(np.abs(target - shares).max())
        shares = target
        if moved <= tolerance:
            break
    return tuple(shares.tolist())


def geometric_median_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    shares_of_one(extent.weights)
    return median_shares((yield squared_distances), extent.weights, extent.params.iterations, extent.params.tolerance)


def geometric_median_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.distance_scope
    return scope


@merge_method(
    family="federated",
    space="weights",
    access="two_pass",
    paper="arXiv:1912.13445",
    statistics=geometric_median_statistics,
    scope=geometric_median_scope,
    params=GeometricMedianParams,
    scratch=8.0,
    weighing=shares_of_one,
)
def geometric_median(
    sources: Sequence[torch.Tensor], weights: Sequence[float], statistics: Sequence[float]
) -> torch.Tensor:
    """Geometric median of the models, by Weiszfeld's iteration (robust federated averaging).

    ``argmin_x sum_i w_i ||x - x_i||`` (Pillutla et al., section 3), found by Weiszfeld's iteration on the shares of the
    sources. Unlike in a mean, a source pulls with its weight alone, however far away it is: fewer than half of the
    weight, however wrong, cannot carry the result away. Tensors of every shape are parts of one vector.

    Raises:
        UsageError: a weight is negative or not finite, or all are zero.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, statistics)
