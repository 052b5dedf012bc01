"""DELLA: drop elements at random, the smaller the likelier."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from mergekit_px.methods.consensus import MERGEKIT, ConsensusParams, divided_twice, merge_by_consensus
from mergekit_px.methods.declare import Extent, Operands, Params, PerSource, RandomStream, Sweep, merge_method
from mergekit_px.methods.pruning import SharePerSource, l1_factors, per_source, rescaled_sum

if TYPE_CHECKING:
    import torch

Rescale = Literal["probability", "l1", "none"]
Window = Annotated[float, Field(ge=0, le=0.5)]
WindowPerSource = Annotated[Window | tuple[Window, ...], PerSource()]


def _check_window(density: float | tuple[float, ...], epsilon: float | tuple[float, ...]) -> None:
    count = max((len(value) for value in (density, epsilon) if isinstance(value, tuple)), default=1)
    densities = density if isinstance(density, tuple) else (density,) * count
    windows = epsilon if isinstance(epsilon, tuple) else (epsilon,) * count
    for share, window in zip(densities, windows, strict=False):  # a wrong number is told when the sources are known
        if 0 < share < 1 and not window <= share <= 1 - window:
            raise ValueError(f"density {share:g} plus or minus epsilon {window:g} leaves the range from 0 to 1")


class _Dropped(Params):
    density: SharePerSource = 0.5
    """Mean probability with which an element of a source is kept, 1 minus the drop rate."""
    epsilon: WindowPerSource = 0.15
    """The smallest element of a row is kept with probability density - epsilon, the largest with density + epsilon."""
    rescale: Rescale = "probability"
    """``probability``: divide each element that is left by the probability that it had. ``l1``: multiply what is left
    so that each tensor has the L1 norm that it had. ``none``: leave it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_window(self.density, self.epsilon)
        return self


class DellaLinearParams(_Dropped):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    normalize: bool = False
    """Divide the weights by their sum."""


class DellaParams(_Dropped, ConsensusParams):
    pass


def _keep_probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """float32, of delta's shape: linear in the rank of the magnitude within its row, mean ``density``."""
    import torch

    length = delta.shape[-1]
    ladder = torch.linspace(density - epsilon, density + epsilon, length, device=delta.device)
    if length == 1:
        ladder.fill_(density)
    order = delta.abs().argsort(dim=-1, stable=True)
    return torch.empty_like(delta, dtype=torch.float32).scatter_(-1, order, ladder.expand(delta.shape))


def _sparsified(deltas: Sequence[torch.Tensor], random: RandomStream, params: _Dropped) -> Iterator[torch.Tensor]:
    """Each task vector with its dropped elements zero, the others rescaled."""
    import torch

    from mergekit_px.kernels.random import bernoulli

    count = len(deltas)
    shares = zip(per_source(params.density, count), per_source(params.epsilon, count), strict=True)
    for source, (density, epsilon) in enumerate(shares):
        delta = deltas[source]
        if density in (0, 1):
            yield delta if density else torch.zeros_like(delta)
            continue
        probabilities = _keep_probabilities(delta, density, epsilon)
        kept = bernoulli(random.uniform(source).view(delta.shape), probabilities).to(delta.dtype).mul_(delta)
        yield kept.div_(probabilities.clamp_(min=2.0**-24)) if params.rescale == "probability" else kept


def della_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...] | None]:
    """What is left of each source is multiplied with this; None for nothing."""

    def sparsified(operands: Operands) -> Iterator[torch.Tensor]:
        assert operands.random is not None
        return _sparsified(operands.tensors, operands.random, operands.params)

    return (yield from l1_factors(sparsified)) if extent.params.rescale == "l1" else None


@merge_method(
    space="deltas",
    access="rows",
    paper="arXiv:2406.11617",
    statistics=della_statistics,
    random=True,
    scratch=12.0,
    presets={"mergekit": {"density": 1.0, "rescale": "l1"}},
)
def della_linear(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: DellaLinearParams,
    statistics: tuple[float, ...] | None,
    random: RandomStream,
) -> torch.Tensor:
    """Task arithmetic on task vectors sparsified at random, small elements first (DELLA).

    ``base + scale * sum_i w_i m_i d_i / p_i``, where an element of the mask ``m_i`` is 1 with probability ``p_i``,
    which rises in equal steps from ``density - epsilon`` for the element of least magnitude of a row to
    ``density + epsilon`` for the largest (Deep et al., section 3.1, MagPrune; their epsilon is the whole range, twice
    this one). Rows are the vectors along the last axis, so that a vector is one row. Equal magnitudes rank in the
    order of their places.

    The ``mergekit`` variant keeps everything unless told, and rescales each tensor to the L1 norm that it had.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, one is not finite, or densities
            are given for another number of sources.
    """
    return rescaled_sum(_sparsified(deltas, random, params), weights, params, statistics)


@merge_method(
    space="deltas",
    access="rows",
    paper="arXiv:2406.11617",
    statistics=della_statistics,
    random=True,
    scratch=16.0,
    presets={"mergekit": {"density": 1.0, "rescale": "l1", **MERGEKIT}},
    overshoots=divided_twice,
)
def della(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: DellaParams,
    statistics: tuple[float, ...] | None,
    random: RandomStream,
) -> torch.Tensor:
    """TIES on task vectors sparsified at random, small elements first (DELLA).

    Each task vector is sparsified and rescaled as by ``della_linear``; then ``scale * sum_{i in A} w_i d_i / sum_{i in
    A} w_i``, where A are the sources whose ``w_i d_i`` has the sign of ``sum_i w_i d_i`` (Deep et al., section 3,
    the steps drop, elect and fuse). Rows are the vectors along the last axis, so that a vector is one row.

    The ``mergekit`` variant keeps everything unless told, rescales each tensor to the L1 norm that it had, and gives
    ties to the positive sign.

    Raises:
        UsageError: a weight is not finite, or densities are given for another number of sources.
    """
    return merge_by_consensus(list(_sparsified(deltas, random, params)), weights, params, factors=statistics)
