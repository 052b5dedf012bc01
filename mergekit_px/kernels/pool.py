"""A pool of rank-one components of many sources, of which the K first under some order are kept.

The order of a component depends on itself and its source alone, never on the other sources. So the K first of
everything are the K first of any pools' K firsts: sources may be added one at a time, in any order, to a pool that
was stored years ago, and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mergekit_px.errors import TensorMismatchError, UsageError
from mergekit_px.kernels.low_rank import LowRank
from mergekit_px.kernels.polar import STACK_FLOOR, polar_factor
from mergekit_px.kernels.svd import SVD, truncated_svd

PoolRule = Literal["matrix", "quota", "normalised"]
"""``matrix``: the largest singular values of all (AXIS, arXiv:2508.19353). ``quota``: as many from each source, what
is left over to the largest. ``normalised``: the largest in proportion to their source's Frobenius norm."""


@dataclass(slots=True)
class ComponentPool:
    """The ``limit`` first components of all sources added so far (all of them where the limit is None).

    Ties go to the source added first, then to its earlier component.
    """

    limit: int | None = None
    rule: PoolRule = "matrix"
    label: str = ""
    """Name of the tensor: seeds the sketches, names the place in errors."""
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    """Squared Frobenius norm of each source's whole delta."""
    _u: Tensor | None = None
    _s: Tensor = field(default_factory=lambda: torch.zeros(0))
    _v: Tensor | None = None
    _source: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"a pool keeps at least one component, got {self.limit}", where=self.label or None)

    @property
    def u(self) -> Tensor:
        """(m, k) left vectors of the kept components, first to last."""
        return self._filled(self._u)

    @property
    def s(self) -> Tensor:
        """(k,) their singular values."""
        return self._s

    @property
    def v(self) -> Tensor:
        """(n, k) right vectors."""
        return self._filled(self._v)

    @property
    def source(self) -> Tensor:
        """(k,) int64, the source of each component in order of addition."""
        return self._source

    def add(self, delta: Tensor | LowRank, weight: float = 1.0) -> SVD:
        """Add a source's delta, (m, n) dense or factored; returns its decomposition (before the weight).

        Raises:
            NonFiniteError: a NaN or an infinity in the delta.
            TensorMismatchError: another shape than the sources before.
        """
        if isinstance(delta, LowRank):
            parts = delta.svd(self.limit)
        else:
            parts = truncated_svd(delta, self.limit, seed=self.seed, label=self.label)
        self.add_components(parts, weight)
        return parts

    def add_components(self, parts: SVD, weight: float = 1.0) -> None:
        """Add a source that is decomposed already, into at least ``limit`` components if it has so many."""
        number = len(self.energies)
        self.notes += [f"source {number + 1}: {note}" for note in parts.fallbacks]
        # A negative weight turns the left vectors, so that the singular values stay positive.
        u = -parts.u if weight < 0 else parts.u
        source, order = torch.full((parts.rank,), number), torch.arange(parts.rank)
        self._insert(u, parts.s * abs(weight), parts.v, source, order, [parts.energy * weight**2])

    def merge(self, other: ComponentPool) -> None:
        """Add all sources of another pool of the same limit and rule, behind the own ones."""
        if (self.limit, self.rule) != (other.limit, other.rule):
            raise UsageError("pools of different limits or rules cannot be merged", where=self.label or None)
        if other.energies:
            source = other._source + len(self.energies)
            self._insert(other.u, other.s, other.v, source, other._order, other.energies)

    def sum(self) -> LowRank:
        """The kept components added up: (m, n) of rank at most ``limit``."""
        return LowRank(self.u * self.s, self.v)

    def orthogonalised(self, label: str = "") -> LowRank:
        """The sum with the left and the right vectors made orthonormal, by their polar factors (as TSV-M does).

        Directions that several sources share up to rounding are kept once.
        """
        return orthogonalised([self.u], self.s, [self.v], label or self.label, self.notes)

    def state(self) -> dict[str, Tensor]:
        """Everything but limit, rule, label and seed, as tensors to be stored; see :meth:`from_state`."""
        return {
            "u": self.u.contiguous(),
            "s": self.s,
            "v": self.v.contiguous(),
            "source": self._source,
            "order": self._order,
            "energies": torch.tensor(self.energies, dtype=torch.float64),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], limit: int | None, rule: PoolRule = "matrix", label: str = "", seed: int = 0
    ) -> ComponentPool:
        """The pool that :meth:`state` described; further sources may be added."""
        pool = cls(limit, rule, label, seed)
        energies = [float(e) for e in state["energies"]]
        pool._insert(state["u"], state["s"], state["v"], state["source"], state["order"], energies)
        return pool

    def _insert(self, u: Tensor, s: Tensor, v: Tensor, source: Tensor, order: Tensor, energies: list[float]) -> None:
        if self._u is not None and (u.shape[0], v.shape[0]) != (self.u.shape[0], self.v.shape[0]):
            raise TensorMismatchError(
                f"a source of shape {(u.shape[0], v.shape[0])} does not fit a pool of {(len(self.u), len(self.v))}",
                where=self.label or None,
            )
        self.energies += energies
        left = u if self._u is None else torch.cat([self._u, u], dim=1)
        right = v if self._v is None else torch.cat([self.v, v], dim=1)
        values = torch.cat([self._s.to(s), s])
        source = torch.cat([self._source, source.cpu()])
        order = torch.cat([self._order, order.cpu()])
        first = self._ranking(values, source, order)[: self.limit]
        here = first.to(values.device)
        self._u, self._s, self._v = left[:, here], values[here], right[:, here]
        self._source, self._order = source[first], order[first]

    def _ranking(self, values: Tensor, source: Tensor, order: Tensor) -> Tensor:
        """Indices of all components, first to last. Sorting by the least key first, stably, then by the next."""
        key = values.double().cpu()
        if self.rule == "normalised":
            size = torch.tensor(self.energies, dtype=torch.float64).sqrt()
            key = key / size[source].clamp_min(1e-300)
        index = torch.argsort(order, stable=True)
        index = index[torch.argsort(source[index], stable=True)]
        index = index[torch.argsort(key[index], descending=True, stable=True)]
        if self.rule == "quota":
            index = index[torch.argsort(order[index], stable=True)]
        return index

    def _filled(self, part: Tensor | None) -> Tensor:
        if part is None:
            raise UsageError("the pool has no source yet", where=self.label or None)
        return part


def orthogonalised(us: list[Tensor], s: Tensor, vs: list[Tensor], label: str, notes: list[str]) -> LowRank:
    """``polar(U) diag(s) polar(V)'`` of stacked components (TSV-M, arXiv:2412.00081).

    Args:
        us: (m, k_t) left vectors of each source, unit norm; emptied on the way, to hold each stack only once.
        s: (k,) singular values of all.
        vs: (n, k_t) right vectors of each source; emptied.
        label: name of the tensor, for errors.
        notes: appended to where directions were shared or a driver failed.
    """
    left, shared_left = stack_factor(us, label, notes)
    right, shared_right = stack_factor(vs, label, notes)
    # A few directions nearly coincide by chance where the stack is as wide as the matrix.
    if max(shared_left, shared_right) > len(s) // 50:
        notes.append(f"sources share {shared_left} left and {shared_right} right directions up to rounding")
    return LowRank(left.mul_(s), right)


def stack_factor(parts: list[Tensor], label: str, notes: list[str]) -> tuple[Tensor, int]:
    """The polar factor of matrices side by side, and how many directions it lacks."""
    stack = torch.cat(parts, dim=1)
    parts.clear()
    polar = polar_factor(stack, relative_floor=STACK_FLOOR, overwrite=True, label=label)
    notes += polar.notes
    return polar.factor, min(stack.shape) - polar.rank
