"""SCE: select by variance, calculate weights from energy, erase minority signs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import FiniteFloat

from mergekit_px.methods.consensus import ConsensusParams, merge_by_consensus
from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.pruning import Share, find_ranks, kept_count

if TYPE_CHECKING:
    import torch


class SceParams(Params):
    select: Share = 0.1
    """Share of the elements that is merged, those whose values vary most between the sources."""
    tie: Literal["zero", "positive"] = "zero"
    """What wins where the votes on a sign cancel: neither sign (the merged element is 0), or the positive one."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


class Selection(NamedTuple):
    """What is merged, and with which weights."""

    cut: float
    """The largest spread that is left out."""
    weights: tuple[float, ...]
    """One for each source; they add up to 1."""


def spread(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """``sum_{i<j} (d_i - d_j)^2``, the variance over the sources times the square of their number.

    In this form equal variances are equal numbers where the values are small multiples of one unit.
    """
    import torch

    total = torch.zeros_like(deltas[0])
    for left, right in itertools.combinations(range(len(deltas)), 2):
        difference = deltas[left] - deltas[right]
        total.addcmul_(difference, difference)
    return total


def _selected(deltas: Sequence[torch.Tensor], cut: float) -> list[torch.Tensor]:
    """The task vectors, zero where the spread is not above the cut."""
    if cut == 0:
        return list(deltas)
    mask = spread(deltas).sub_(cut).sign_().clamp_(min=0)
    return [delta * mask for delta in deltas]


def sce_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, Selection]:
    from mergekit_px.kernels.selection import RankSearch

    kept = kept_count(extent.params.select, extent.elements)
    cut = 0.0 if kept else math.inf
    if 0 < kept < extent.elements:
        spreads = RankSearch.start([(0, kept)], extent.elements)
        search = yield from find_ranks(spreads, lambda operands: [spread(operands.tensors)])
        (cut,) = search.cuts()
    energies = (yield partial(_energies, cut)).tolist()
    total = math.fsum(energies)
    return Selection(cut, tuple(energy / total if total else 1 / extent.sources for energy in energies))


def _energies(cut: float, operands: Operands) -> torch.Tensor:
    import torch

    from mergekit_px.kernels.reduction import element_sum

    return torch.stack([element_sum(delta.double().square()) for delta in _selected(operands.tensors, cut)])


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2408.07990",
    sources=(2, None),
    statistics=sce_statistics,
    scratch=10.0,
    presets={"mergekit": {"select": 1.0, "tie": "positive"}},
)
def sce(deltas: Sequence[torch.Tensor], params: SceParams, statistics: Selection) -> torch.Tensor:
    """Merge the elements of highest variance, weighted by each source's energy, where signs agree (SCE).

    1. Select: of the tensor's n elements the ``int(select * n)`` with the largest variance over the sources (what
       ties with the last stays too); the others are those of the base.
    2. Calculate: ``w_i``, the share of source i in the sum of squares of what was selected.
    3. Erase: ``scale * sum_{i in A} w_i d_i / sum_{i in A} w_i``, where A are the sources whose ``d_i`` has the sign
       of ``sum_i d_i`` (Wan et al., section 3.3).

    Each tensor is treated alone, whatever its shape. The ``mergekit`` variant selects everything unless told, and
    gives ties to the positive sign.
    """
    consensus = ConsensusParams(scale=params.scale, tie=params.tie, weighted_vote=False)
    return merge_by_consensus(_selected(deltas, statistics.cut), statistics.weights, consensus)
