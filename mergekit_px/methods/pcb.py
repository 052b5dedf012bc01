"""PCB: parameters compete within a task and between tasks for their place in the merge."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.pruning import Share, find_ranks, kept_count

if TYPE_CHECKING:
    import torch


class PcbParams(Params):
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each source's elements that takes part, those of the highest score."""
    clip: Share = 1e-4
    """Share of each source's magnitudes that is clipped at either end (the smallest, and the largest)."""
    scope: Literal["model", "tensor"] = "model"
    """What an element competes with: all merged tensors together, as in the paper, or its own tensor alone."""
    scale: FiniteFloat = 1.2
    """Factor of the merged task vector (lambda)."""


class Contest(NamedTuple):
    """What the elements of one source are measured by."""

    least: float
    """Magnitudes are raised to this ..."""
    most: float
    """... and cut down to this."""
    entry: float = 0.0
    """The score from which an element takes part."""
    best: float = 0.0
    """The highest score."""


def scores(deltas: Sequence[torch.Tensor], contests: Sequence[Contest]) -> list[torch.Tensor]:
    """How well each element balances its own size against its agreement with the others, 0 where they disagree."""
    import torch

    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total += delta
    found = []
    for delta, contest in zip(deltas, contests, strict=True):
        span = contest.most - contest.least
        size = delta.abs().clamp_(contest.least, contest.most).sub_(contest.least)
        intra = size.div_(span or 1.0).square_().mul_(len(deltas)).exp_()
        found.append(intra.mul_((delta * total).tanh_()).clamp_(min=0))
    return found


def pcb_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[Contest, ...]]:
    from mergekit_px.kernels.selection import RankSearch

    count = extent.elements
    if not count:
        return (Contest(0.0, 0.0),) * extent.sources
    low = count - int(count * extent.params.clip)
    high = count - max(int(count * (1 - extent.params.clip)) - 1, 0)
    sources = range(extent.sources)
    bounds = RankSearch.start([(source, rank) for source in sources for rank in (low, min(high, low))], count)
    found = (yield from find_ranks(bounds)).values()
    contests = [Contest(*found[2 * source : 2 * source + 2]) for source in sources]

    def scored(operands: Operands) -> list[torch.Tensor]:
        return scores(operands.tensors, contests)

    kept = kept_count(extent.params.density, count)
    entries = RankSearch.start([(source, rank) for source in sources for rank in (kept, 1)], count)
    found = (yield from find_ranks(entries, scored)).values()
    return tuple(
        contest._replace(entry=found[2 * source], best=found[2 * source + 1]) for source, contest in enumerate(contests)
    )


def pcb_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.scope
    return scope


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2410.02396",
    statistics=pcb_statistics,
    scope=pcb_scope,
    scratch=12.0,
)
def pcb(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], params: PcbParams, statistics: Sequence[Contest]
) -> torch.Tensor:
    """Weigh each element by its size in its task and its agreement with others (PCB, parameter competition balancing).

    With T sources, ``n_i`` the magnitudes of source i after clipping, brought to [0, 1] over the whole model, an
    element's score is ``s_i = exp(T n_i^2) tanh(d_i sum_j d_j)``; where it is below 0, that is where a source
    disagrees with the sum, it counts as 0. ``b_i`` is 0 up to the score that ``density`` of the source's elements
    reach, and rises to 1 at its highest. The result is ``base + scale * sum_i w_i b_i d_i / sum_i b_i``, with ``d_i``
    of clipped magnitude (Du et al., section 3, in the form of the authors' code, which also has the scale of 1.2).
    All thresholds are exact. Element by element, whatever the shape.
    """
    import torch

    total = torch.zeros_like(deltas[0])
    shares = torch.zeros_like(total)
    for delta, weight, contest, score in zip(deltas, weights, statistics, scores(deltas, statistics), strict=True):
        share = score.sub_(contest.entry).clamp_(min=0).div_((contest.best - contest.entry) or 1.0)
        shares += share
        clipped = delta.abs().clamp_(contest.least, contest.most).mul_(delta.sign())
        total.addcmul_(clipped, share, value=weight)
    return total.div_(shares.clamp_(min=1e-12)).mul_(params.scale)
