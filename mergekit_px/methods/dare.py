"""DARE: drop elements of the task vectors at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import FiniteFloat

from mergekit_px.methods.consensus import MERGEKIT, PEFT, ConsensusParams, divided_twice, merge_by_consensus
from mergekit_px.methods.declare import Extent, Operands, Params, RandomStream, Sweep, merge_method
from mergekit_px.methods.pruning import SharePerSource, l1_factors, per_source, rescaled_sum

if TYPE_CHECKING:
    import torch

Rescale = Literal["density", "l1", "none"]


class _Dropped(Params):
    density: SharePerSource = 0.5
    """Probability with which an element of a source is kept, 1 minus the drop rate."""
    rescale: Rescale = "density"
    """``density``: divide what is left by the density, which keeps its expectation. ``l1``: multiply it so that
    each tensor has the L1 norm that it had. ``none``: leave it."""


class DareLinearParams(_Dropped):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    normalize: bool = False
    """Divide the weights by their sum."""


class DareTiesParams(_Dropped, ConsensusParams):
    pass


def _sparsified(deltas: Sequence[torch.Tensor], random: RandomStream, params: _Dropped) -> Iterator[torch.Tensor]:
    """Each task vector with its dropped elements zero."""
    from mergekit_px.kernels.random import bernoulli

    for source, (delta, density) in enumerate(zip(deltas, per_source(params.density, len(deltas)), strict=True)):
        if density in (0, 1):
            yield delta if density else delta.new_zeros(delta.shape)
            continue
        kept = bernoulli(random.uniform(source), density)
        yield kept.to(delta.dtype).view(delta.shape).mul_(delta)


def dare_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...] | None]:
    def sparsified(operands: Operands) -> Iterator[torch.Tensor]:
        assert operands.random is not None
        return _sparsified(operands.tensors, operands.random, operands.params)

    if extent.params.rescale == "l1":
        return (yield from l1_factors(sparsified))
    if extent.params.rescale == "density":
        return tuple(1 / density if density else 1.0 for density in per_source(extent.params.density, extent.sources))
    return None


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2311.03099",
    statistics=dare_statistics,
    random=True,
    scratch=4.0,
    presets={"mergekit": {"density": 1.0, "rescale": "l1"}, "peft": {}},
)
def dare_linear(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: DareLinearParams,
    statistics: tuple[float, ...] | None,
    random: RandomStream,
) -> torch.Tensor:
    """Task arithmetic on randomly sparsified task vectors (DARE: drop and rescale).

    ``base + scale * sum_i w_i m_i d_i / density_i``, where each element of the mask ``m_i`` is 1 with probability
    ``density_i`` (Yu et al., section 3.1: drop rate ``p = 1 - density``, rescaling by ``1 / (1 - p)``). Masks are
    independent between sources. Element by element, whatever the shape.

    The ``mergekit`` variant keeps everything unless told, and rescales each tensor to the L1 norm that it had.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, one is not finite, or densities
            are given for another number of sources.
    """
    return rescaled_sum(_sparsified(deltas, random, params), weights, params, statistics)


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2311.03099",
    statistics=dare_statistics,
    random=True,
    scratch=8.0,
    presets={
        "mergekit": {"density": 1.0, "rescale": "l1", "divide_by": "nothing", **MERGEKIT},
        "peft": PEFT,
    },
    overshoots=divided_twice,
)
def dare_ties(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: DareTiesParams,
    statistics: tuple[float, ...] | None,
    random: RandomStream,
) -> torch.Tensor:
    """TIES on randomly sparsified task vectors (DARE: drop and rescale).

    Each task vector is sparsified and rescaled as by ``dare_linear``; then
    ``scale * sum_{i in A} w_i d_i / sum_{i in A} w_i``, where A are the sources whose ``w_i d_i`` has the sign of
    ``sum_i w_i d_i`` (arXiv:2311.03099, section 3.1, with steps 2 and 3 of arXiv:2306.01708; nothing is trimmed by
    magnitude). Element by element, whatever the shape.

    The variants of other implementations: ``mergekit`` keeps everything unless told, rescales each tensor to the L1
    norm that it had, does not divide, and gives ties to the positive sign; ``peft`` elects before it applies the
    weights, divides by the number of agreeing sources, and gives ties to the positive sign.

    Raises:
        UsageError: a weight is not finite, or densities are given for another number of sources.
    """
    return merge_by_consensus(list(_sparsified(deltas, random, params)), weights, params, factors=statistics)
