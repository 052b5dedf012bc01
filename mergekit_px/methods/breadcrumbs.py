"""Model Breadcrumbs: drop the smallest and the largest changes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import FiniteFloat

from mergekit_px.methods.consensus import MERGEKIT, ConsensusParams, merge_by_consensus
from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.pruning import SharePerSource, find_ranks, kept_count, l1_factors, per_source
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch


class BreadcrumbsParams(Params):
    density: SharePerSource = 0.1
    """Share of each source's elements that is kept."""
    gamma: SharePerSource = 0.01
    """Share of each source's elements, the largest in magnitude, that is dropped; less where the density needs them."""
    rescale: Literal["none", "l1"] = "none"
    """``l1``: multiply what is left of each source so that it has the L1 norm that it had."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""
    normalize: bool = False
    """Divide the weights by their sum."""


class BreadcrumbsTiesParams(ConsensusParams):
    density: SharePerSource = 0.1
    """Share of each source's elements that is kept."""
    gamma: SharePerSource = 0.01
    """Share of each source's elements, the largest in magnitude, that is dropped; less where the density needs them."""
    rescale: Literal["none", "l1"] = "none"
    """``l1``: multiply what is left of each source so that it has the L1 norm that it had."""


class Crumbs(NamedTuple):
    """What is left of each source."""

    bands: tuple[tuple[float, float], ...]
    """Magnitudes above the first and up to the second stay."""
    factors: tuple[float, ...] | None
    """What they are multiplied with."""


def _within(deltas: Sequence[torch.Tensor], bands: Sequence[tuple[float, float]]) -> Iterator[torch.Tensor]:
    from mergekit_px.kernels.signs import trim

    for delta, (low, high) in zip(deltas, bands, strict=True):
        kept = trim(delta, low)
        yield kept if high == float("inf") else kept.sub_(trim(delta, max(low, high)))


def breadcrumbs_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, Crumbs]:
    from mergekit_px.kernels.selection import RankSearch

    bands = [(0.0, float("inf"))] * extent.sources
    wanted = {}
    shares = zip(
        per_source(extent.params.density, extent.sources), per_source(extent.params.gamma, extent.sources), strict=True
    )
    for source, (density, gamma) in enumerate(shares):
        kept = kept_count(density, extent.elements)
        dropped = min(int(gamma * extent.elements), extent.elements - kept)
        if kept == 0:
            bands[source] = (float("inf"), float("inf"))
        elif kept < extent.elements:
            wanted[source] = (source, dropped + 1), (source, dropped + kept)
    if wanted:
        ranks = [rank for pair in wanted.values() for rank in pair]
        search = yield from find_ranks(RankSearch.start(ranks, extent.elements))
        bounds = zip(search.values()[::2], search.cuts()[1::2], strict=True)
        for source, (high, low) in zip(wanted, bounds, strict=True):
            bands[source] = (low, high)

    def pruned(operands: Operands) -> Iterator[torch.Tensor]:
        return _within(operands.tensors, bands)

    factors = (yield from l1_factors(pruned)) if extent.params.rescale == "l1" and wanted else None
    return Crumbs(tuple(bands), factors)


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2312.06795",
    statistics=breadcrumbs_statistics,
    scratch=4.0,
    presets={"mergekit": {"density": 1.0}},
)
def breadcrumbs(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: BreadcrumbsParams, statistics: Crumbs
) -> torch.Tensor:
    """Task arithmetic without the smallest and largest elements of each task vector (Model Breadcrumbs).

    ``base + scale * sum_i w_i m_i d_i``, where the mask ``m_i`` leaves out the ``int(gamma * n)`` largest of the
    tensor's n magnitudes and keeps the ``int(density * n)`` that follow (Davari and Belilovsky, section 3, with
    beta = 1 - gamma - density). Both thresholds are exact, and what ties with a kept element is kept as well.
    Each tensor is masked alone, whatever its shape. The ``mergekit`` variant keeps everything unless told.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, one is not finite, or densities
            or gammas are given for another number of sources.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    factor = params.scale / total_weight(weights) if params.normalize else params.scale
    factors = statistics.factors or (1.0,) * len(deltas)
    coefficients = [factor * weight * rescale for weight, rescale in zip(finite_weights(weights), factors, strict=True)]
    return weighted_sum(_within(deltas, statistics.bands), coefficients)


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2312.06795",
    statistics=breadcrumbs_statistics,
    scratch=8.0,
    presets={"mergekit": {"density": 1.0, "divide_by": "nothing", **MERGEKIT}},
)
def breadcrumbs_ties(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: BreadcrumbsTiesParams, statistics: Crumbs
) -> torch.Tensor:
    """TIES without the smallest and largest elements of each task vector (Model Breadcrumbs).

    Each task vector is masked as by ``breadcrumbs`` (arXiv:2312.06795); then ``scale * sum_{i in A} w_i d_i /
    sum_{i in A} w_i``, where A are the sources whose ``w_i d_i`` has the sign of ``sum_i w_i d_i`` (steps 2 and 3 of
    arXiv:2306.01708). Each tensor is masked alone, whatever its shape. The ``mergekit`` variant keeps everything
    unless told, does not divide, and gives ties to the positive sign.

    Raises:
        UsageError: a weight is not finite, or densities or gammas are given for another number of sources.
    """
    return merge_by_consensus(list(_within(deltas, statistics.bands)), weights, params, factors=statistics.factors)
