"""What the methods that thin out task vectors share: densities, exact trimming, rescaling to the old norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Extent, Operands, PerSource, Sweep
from mergekit_px.methods.weighting import finite_weights, total_weight

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.selection import RankSearch

Share = Annotated[float, Field(ge=0, le=1)]
SharePerSource = Annotated[Share | tuple[Share, ...], PerSource()]


def per_source(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """One value for each of ``count`` sources.

    Raises:
        UsageError: another number of values was given.
    """
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise UsageError(f"{len(values)} values were given for {count} sources", hint="give one, or one for each")
    return values


def kept_count(density: float, elements: int) -> int:
    """How many of so many elements a density keeps: rounded down, but at least one unless the density is 0."""
    return max(int(density * elements), math.ceil(density)) if elements else 0


@dataclass(frozen=True)
class RankSweep:
    """One step of a search for order statistics: a sweep that counts."""

    search: RankSearch
    values: Callable[[Operands], Sequence[torch.Tensor]]

    def __call__(self, operands: Operands) -> torch.Tensor:
        return self.search.count(self.values(operands))


def find_ranks(
    search: RankSearch, values: Callable[[Operands], Sequence[torch.Tensor]] = attrgetter("tensors")
) -> Generator[Sweep, torch.Tensor, RankSearch]:
    """Drive a search for order statistics to its end: of the sources, or of what is made of them."""
    while not search.done:
        search = search.narrow((yield RankSweep(search, values)))
    return search


def magnitude_cuts(extent: Extent, kept: Sequence[int]) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """For each source the cut above which lie its ``kept`` largest magnitudes and all that tie with the least of them.

    inf where none is kept, 0 where all are.
    """
    from mergekit_px.kernels.selection import RankSearch

    cuts = [0.0 if count else math.inf for count in kept]
    wanted = [(source, count) for source, count in enumerate(kept) if 0 < count < extent.elements]
    if wanted:
        search = yield from find_ranks(RankSearch.start(wanted, extent.elements))
        for (source, _), cut in zip(wanted, search.cuts(), strict=True):
            cuts[source] = cut
    return tuple(cuts)


def l1_factors(
    prune: Callable[[Operands], Iterable[torch.Tensor]],
) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """For each source the factor that gives what is left of it the L1 norm that it had; 1 where nothing is left."""
    from mergekit_px.kernels.reduction import absolute_sum

    def norms(operands: Operands) -> torch.Tensor:
        import torch

        pairs = zip(operands.tensors, prune(operands), strict=True)
        return torch.stack([torch.stack([absolute_sum(whole), absolute_sum(left)]) for whole, left in pairs])

    total = yield norms
    return tuple(whole / left if left else 1.0 for whole, left in total.tolist())


def rescaled_sum(
    pruned: Iterable[torch.Tensor], weights: Sequence[float], params: Any, factors: Sequence[float] | None
) -> torch.Tensor:
    """The sum of pruned task vectors, by their weights (divided by their sum where the parameters say
    so) and by what gives each its size again.

    Raises:
        UsageError: the weights add up to zero and are to be divided by their sum, or one is not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    factor = params.scale / total_weight(weights) if params.normalize else params.scale
    rescaling = factors or (1.0,) * len(weights)
    return weighted_sum(pruned, [factor * w * f for w, f in zip(finite_weights(weights), rescaling, strict=True)])
