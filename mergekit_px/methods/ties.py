"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mergekit_px.methods.consensus import MERGEKIT, PEFT, ConsensusParams, merge_by_consensus
from mergekit_px.methods.declare import Extent, Operands, Sweep, merge_method
from mergekit_px.methods.pruning import SharePerSource, kept_count, l1_factors, magnitude_cuts, per_source

if TYPE_CHECKING:
    import torch


class TiesParams(ConsensusParams):
    density: SharePerSource = 0.2
    """Share of each source's elements that is kept, the largest in magnitude."""
    trim_scope: Literal["model", "tensor"] = "model"
    """Where the largest are sought: in all merged tensors of a source together, as in the paper, or in each alone."""
    rescale: Literal["none", "l1"] = "none"
    """``l1``: multiply what is left of each source so that it has the L1 norm that it had."""


class Trimming(NamedTuple):
    """How each source is trimmed."""

    cuts: tuple[float, ...]
    """The largest magnitude that is trimmed away."""
    factors: tuple[float, ...] | None
    """What the rest is multiplied with."""


def ties_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, Trimming]:
    densities = per_source(extent.params.density, extent.sources)
    cuts = yield from magnitude_cuts(extent, [kept_count(density, extent.elements) for density in densities])

    def trimmed(operands: Operands) -> Iterator[torch.Tensor]:
        from mergekit_px.kernels.signs import trim

        return map(trim, operands.tensors, cuts)

    factors = (yield from l1_factors(trimmed)) if extent.params.rescale == "l1" and any(cuts) else None
    return Trimming(cuts, factors)


def ties_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.trim_scope
    return scope


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2306.01708",
    statistics=ties_statistics,
    scope=ties_scope,
    scratch=4.0,
    presets={
        "mergekit": {"density": 1.0, "trim_scope": "tensor", **MERGEKIT},
        "peft": {"trim_scope": "tensor", **PEFT},
    },
)
def ties(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: TiesParams, statistics: Trimming
) -> torch.Tensor:
    """Trim each task vector, elect a sign for each element, merge the values that agree (TIES).

    1. Trim: of the n elements of a source the ``k = int(density * n)`` largest magnitudes stay (at least one unless
       the density is 0), the rest become 0. The threshold is exact, and all elements that tie with the k-th stay.
    2. Elect: the sign of ``sum_i w_i d_i`` in each element.
    3. Merge: ``scale * sum_{i in A} w_i d_i / sum_{i in A} w_i``, where A are the sources whose trimmed ``w_i d_i``
       has the elected sign (Yadav et al., section 3 and algorithm 1, which have no weights).

    Tensors of every shape are treated alike, element by element. The variants of other implementations:
    ``mergekit`` trims each tensor alone, keeps everything unless told, and gives ties to the positive sign;
    ``peft`` also elects before it applies the weights, and divides by the number of agreeing sources.

    Raises:
        UsageError: a weight is not finite, or densities are given for another number of sources.
    """
    return merge_by_consensus(deltas, weights, params, cuts=statistics.cuts, factors=statistics.factors)
