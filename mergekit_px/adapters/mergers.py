"""Rules that make one matrix of several, in whatever coordinates they are given: dW itself, a core, a projection.

A rule sees matrices of one shape, a weight for each, and the cut below which each matrix's entries are trimmed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    import torch

DivideBy = Literal["weights", "count", "nothing"]


@dataclass(frozen=True)
class MergeInput:
    """What a rule works on.

    Attributes:
        matrices: one for each adapter, equal shapes, float32 or float64.
        weights: one for each.
        cuts: the largest magnitude of each that is trimmed away; inf trims everything, 0 nothing.
        name: of the module; random rules draw by it.
        seed: of random rules.
        density: share of the entries that random rules keep.
        divide_by: what a sum over agreeing entries is divided by.
    """

    matrices: Sequence[torch.Tensor]
    weights: Sequence[float]
    cuts: Sequence[float]
    name: str
    seed: int
    density: float
    divide_by: DivideBy


Merger = Callable[[MergeInput], "torch.Tensor"]


def linear(given: MergeInput) -> torch.Tensor:
    """``sum_i w_i M_i``."""
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(given.matrices, given.weights)


def magnitude_prune(given: MergeInput) -> torch.Tensor:
    """``sum_i w_i trim(M_i)``: the entries of largest magnitude, weighted and added."""
    from mergekit_px.kernels.reduction import weighted_sum
    from mergekit_px.kernels.signs import trim

    return weighted_sum([trim(m, cut) for m, cut in zip(given.matrices, given.cuts, strict=True)], given.weights)


def ties(given: MergeInput) -> torch.Tensor:
    """Trim, elect the sign of the weighted sum, combine what has it (arXiv 2306.01708)."""
    return _consensus(given.matrices, given)


def dare_linear(given: MergeInput) -> torch.Tensor:
    """``sum_i w_i mask_i M_i / density``: entries dropped at random, the rest rescaled (arXiv 2311.03099)."""
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(_sparsified(given), given.weights)


def dare_ties(given: MergeInput) -> torch.Tensor:
    """Entries dropped at random, then elected and combined as by ``ties``, without trimming."""
    return _consensus(_sparsified(given), given, trimmed=False)


MERGERS: dict[str, Merger] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}

TRIMMING = frozenset({"ties", "magnitude_prune"})
"""Rules that trim, so that cuts must be found for them."""


def find_merger(merger: str | Merger) -> Merger:
    """A rule by name. Raises UsageError."""
    if callable(merger):
        return merger
    if merger not in MERGERS:
        raise UsageError(f"unknown merger '{merger}'", hint=f"known are {', '.join(MERGERS)}")
    return MERGERS[merger]


class Cutter:
    """Finds the magnitude below which the entries of one adapter are trimmed, exactly and without a sort, from
    matrices seen one at a time: ``see`` all of them, ``step``, and again until ``done``.

    Args:
        elements: entries in all.
        density: share that is kept: rounded down, at least one entry unless the density is 0. Entries that tie
            with the least one stay.
    """

    def __init__(self, elements: int, density: float) -> None:
        from mergekit_px.kernels.selection import RankSearch

        kept = max(int(density * elements), math.ceil(density)) if elements else 0
        self._search = RankSearch.start([(0, kept)], elements) if 0 < kept < elements else None
        self._total: torch.Tensor | None = None
        self._plain = 0.0 if kept else math.inf

    @property
    def done(self) -> bool:
        return self._search is None or self._search.done

    def see(self, matrix: torch.Tensor) -> None:
        """Count one matrix."""
        if self._search is not None and not self._search.done:
            counts = self._search.count([matrix])
            self._total = counts if self._total is None else self._total + counts

    def step(self) -> None:
        """End a sweep."""
        if self._search is not None and self._total is not None:
            self._search, self._total = self._search.narrow(self._total), None

    @property
    def cut(self) -> float:
        """The largest magnitude that is trimmed away."""
        return self._plain if self._search is None else self._search.cuts()[0]


def _consensus(matrices: Sequence[torch.Tensor], given: MergeInput, *, trimmed: bool = True) -> torch.Tensor:
    from mergekit_px.kernels.signs import disjoint_sum, elect_signs

    cuts = given.cuts if trimmed else [0.0] * len(matrices)
    signs = elect_signs(matrices, given.weights, cuts, vote="sum", tie="zero")
    shares = {"weights": [abs(weight) for weight in given.weights], "count": [1.0] * len(matrices), "nothing": None}
    return disjoint_sum(
        matrices,
        signs,
        given.weights,
        cuts,
        orientations=[math.copysign(1.0, weight) if weight else 0.0 for weight in given.weights],
        shares=shares[given.divide_by],
    )


def _sparsified(given: MergeInput) -> list[torch.Tensor]:
    from mergekit_px.kernels.random import RandomStream, bernoulli

    if not 0 < given.density < 1:
        return [matrix * float(given.density > 0) for matrix in given.matrices]
    shape, device = given.matrices[0].shape, given.matrices[0].device
    stream = RandomStream(given.seed, given.name, 0, given.matrices[0].numel(), device)
    return [
        matrix * bernoulli(stream.uniform(source), given.density).to(matrix.dtype).view(shape) / given.density
        for source, matrix in enumerate(given.matrices)
    ]
