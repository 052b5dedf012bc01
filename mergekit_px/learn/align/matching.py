"""Permutations of one model that bring its weights as near as can be to those of another.

Coordinate descent over assignment problems (Git Re-Basin, arXiv 2209.04836): with all other permutations fixed, the one
of a set of units maximises ``sum <W_B, P W_A Q'>`` over the tensors that the units lie on. Heads are matched by the
spectra of their projections (TransFusion, arXiv 2505.22697), which the order inside a head does not change, or by the
same inner product as everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mergekit_px.learn.align.assignment import best_assignment, is_better
from mergekit_px.learn.align.heads import HeadOrder, Heads, Inside, head_order, match_by_spectrum
from mergekit_px.learn.align.permutations import RESIDUAL, Attention, Hidden, Layout, Part, Permutations, identity_units
from mergekit_px.learn.data import derived_seed

Tensors = Mapping[str, Tensor]
HeadMatching = Literal["spectrum", "product"]

_WORTH_A_LINE = 2.0  # seconds


@dataclass
class Matching:
    """Permutations, and how they were found.

    Attributes:
        rounds: of the coordinate descent, the last one without change included.
        stable: whether it ended because nothing changed.
        similarity: cosine of all tensors with a permuted axis, before and after.
    """

    permutations: Permutations
    rounds: int
    stable: bool
    similarity: tuple[float, float] = field(default=(0.0, 0.0))


def match(
    layout: Layout,
    source: Tensors,
    target: Tensors,
    *,
    by: HeadMatching,
    inside: Inside,
    rounds: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> Matching:
    """The permutations of ``source`` that fit ``target`` best.

    The descent begins twice, with the identity and with the residual stream matched by the tensors that nothing else
    permutes (embeddings, norms, heads); the end with the greater similarity is taken.

    Tensors that one of both lacks, or that have other shapes there, are permuted without a say.

    Args:
        by: how heads find one another.
        inside: how their channels do.
        rounds: at most as many rounds, each through all units in an order drawn from the seed.
        say: gets a line after each round that takes some seconds.
    """
    first = _descended(_Descent(layout, source, target, inside), by, rounds, seed, say)
    anchored = _Descent(layout, source, target, inside)
    if not anchored.anchor():
        return first
    second = _descended(anchored, by, rounds, seed, say)
    return second if second.similarity[1] > first.similarity[1] else first


def _descended(descent: _Descent, by: HeadMatching, rounds: int, seed: int, say: Callable[[str], None]) -> Matching:
    """Rounds through all units until none of them changes."""
    if by == "spectrum":
        descent.match_spectra()
    items, done, changed = descent.items(), 0, True
    while changed and done < rounds:
        started = time.monotonic()
        generator = torch.Generator().manual_seed(derived_seed(seed, "rebasin", done))
        order = torch.randperm(len(items), generator=generator).tolist()
        better = sum([descent.improve(items[number]) for number in order])
        changed, done = better > 0, done + 1
        if time.monotonic() - started > _WORTH_A_LINE:
            say(f"round {done}: {better} of {len(items)} layers changed")
    return Matching(descent.permutations(), done, not changed, (descent.before, descent.similarity()))


def random_permutations(layout: Layout, target: Tensors, inside: Inside, seed: int) -> Permutations:
    """What `match` might have found, drawn from the seed: a control."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "rebasin", "random"))
    units = identity_units(layout)
    for key in [*([RESIDUAL] if layout.residual else []), *(hidden.key for hidden in layout.hidden)]:
        units[key] = torch.randperm(len(units[key]), generator=generator)
    for attention in layout.attention:
        units.update(HeadOrder.random(attention, inside, generator).units(attention))
    return Permutations.of_units(layout, {name: tuple(tensor.shape) for name, tensor in target.items()}, units)


class _Descent:
    """The permutations as they are, and single steps that improve them."""

    def __init__(self, layout: Layout, source: Tensors, target: Tensors, inside: Inside) -> None:
        self._layout = layout
        self._shapes = {name: tuple(tensor.shape) for name, tensor in target.items()}
        self._target = target
        self._source = {
            name: tensor for name, tensor in source.items() if self._shapes.get(name) == tuple(tensor.shape)
        }
        self._inside = inside
        self._units = identity_units(layout)
        self._orders: dict[str, HeadOrder] = {one.name: HeadOrder.identity(one) for one in layout.attention}
        self._now = self.permutations()
        self._changes = {RESIDUAL: 0, "blocks": 0}  # blocks depend on the stream alone, and it on all of them
        self._candidates: dict[str, list[HeadOrder]] = {}
        self._seen: dict[tuple[type, str], int] = {}
        self.before = self.similarity()

    def permutations(self) -> Permutations:
        return Permutations.of_units(self._layout, self._shapes, self._units)

    def similarity(self) -> float:
        """Cosine of the source, permuted as it is now, and the target."""
        now = self.permutations()
        names = {part.tensor for _, part in self._layout.parts()} & self._source.keys()
        product = squares = others = 0.0
        for name in sorted(names):
            ours, theirs = self._target[name].double(), now.permute(name, self._source[name]).double()
            product += float((ours * theirs).sum())
            squares += float(ours.square().sum())
            others += float(theirs.square().sum())
        return product / (squares * others) ** 0.5 if squares and others else 0.0

    def items(self) -> list[Hidden | Attention | None]:
        """Everything that can be improved; None is the residual stream."""
        return [*([None] if self._layout.residual else []), *self._layout.hidden, *self._layout.attention]

    def anchor(self) -> bool:
        """Match the residual stream by the tensors that nothing else permutes; returns whether anything changed."""
        single = [part for part in self._layout.residual if len(self._axes(part.tensor)) == 1]
        return self._assign(RESIDUAL, single)

    def match_spectra(self) -> None:
        """Find which heads are alike by their spectra, which no order of channels changes."""
        for attention in self._layout.attention:
            alike = match_by_spectrum(attention, *self._heads(attention, weights=True))
            self._candidates[attention.name] = [HeadOrder.identity(attention), alike]

    def improve(self, item: Hidden | Attention | None) -> bool:
        """Find the best order of some units (None: of the residual stream) with all others fixed.

        Returns whether it is another than before, and better.
        """
        name = RESIDUAL if item is None else item.name
        others = self._changes["blocks" if item is None else RESIDUAL]
        if self._seen.get((type(item), name)) == others:
            return False  # nothing that it depends on is another than when it was improved last
        self._seen[type(item), name] = others
        changed = self._improve(item)
        self._changes[RESIDUAL if item is None else "blocks"] += changed
        return changed

    def _improve(self, item: Hidden | Attention | None) -> bool:
        if item is None:
            return self._assign(RESIDUAL, self._layout.residual)
        if isinstance(item, Hidden):
            return self._assign(item.key, item.parts)
        target, source = self._heads(item)
        now = self._orders[item.name]
        found = head_order(item, target, source, now, self._inside, self._candidates.get(item.name))
        if found is None:
            return False
        self._set_heads(item, found)
        return True

    def _assign(self, key: str, parts: Sequence[Part]) -> bool:
        parts = [part for part in parts if part.tensor in self._source and part.tensor not in self._layout.square]
        if not parts:
            return False
        products = torch.zeros(len(parts[0].rows), len(parts[0].rows), dtype=torch.float64)
        for part in parts:
            products += self._rows(part, self._target[part.tensor]) @ self._permuted_rows(part).T
        found = best_assignment(products)
        if not is_better(products, found, self._units[key]):
            return False
        self._units[key] = found
        self._now = self.permutations()
        return True

    def _set_heads(self, attention: Attention, order: HeadOrder) -> None:
        self._orders[attention.name] = order
        self._units.update(order.units(attention))
        self._now = self.permutations()

    def _heads(self, attention: Attention, *, weights: bool = False) -> tuple[Heads, Heads]:
        """The rows of all heads of both models; of the source with its other axes permuted.

        ``weights``: of the matrices alone, without biases and norms.
        """

        def gather(parts: Sequence[Part], *, source: bool) -> Tensor:
            used = [part for part in parts if part.tensor in self._source]
            used = [part for part in used if not weights or self._target[part.tensor].ndim > 1]
            rows = [self._permuted_rows(one) if source else self._rows(one, self._target[one.tensor]) for one in used]
            return torch.cat(rows, dim=1)

        kinds = (attention.query, attention.key, attention.value, attention.output)
        ours, theirs = ([gather(parts, source=source) for parts in kinds] for source in (False, True))
        return Heads.of(attention, *ours), Heads.of(attention, *theirs)

    def _permuted_rows(self, part: Part) -> Tensor:
        name = part.tensor
        return self._rows(part, self._now.permute(name, self._source[name], but=part.axis))

    @staticmethod
    def _rows(part: Part, tensor: Tensor) -> Tensor:
        """What a tensor has at the units of a part, (units, rest)."""
        return tensor.movedim(part.axis, 0).index_select(0, part.rows).reshape(len(part.rows), -1).double()

    def _axes(self, name: str) -> set[int]:
        return {axis for tensor, axis in self._now.orders if tensor == name}
