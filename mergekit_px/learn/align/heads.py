"""Which head of one model stands for which of another, and the order of the channels inside.

A group is a key and value head with the query heads that share it (one of them where nothing is shared). Groups change
places as a whole, query heads inside their group, channels inside their head: those of queries and keys together, those
of values and of the output projection together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_px.learn.align.assignment import TIE, best_assignment, is_better, total
from mergekit_px.learn.align.permutations import Attention

Inside = Literal["joint", "separate"]

_ALTERNATIONS = 10


@dataclass(frozen=True, eq=False)
class Heads:
    """The rows of every head: query (groups, queries, channels, features), key (groups, channels, features), value
    (groups, value channels, features), output (groups, queries, value channels, outputs)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @classmethod
    def of(cls, attention: Attention, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Heads:
        """From the rows of all units one below the other."""
        groups, queries = attention.groups, attention.queries
        return cls(
            query.reshape(groups, queries, attention.channels, -1),
            key.reshape(groups, attention.channels, -1),
            value.reshape(groups, attention.value_channels, -1),
            output.reshape(groups, queries, attention.value_channels, -1),
        )


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """What of the source stands at each place: groups (groups,), queries in them (groups, queries), channels of queries
    and keys (groups, channels), channels of values (groups, value channels)."""

    groups: Tensor
    queries: Tensor
    inside: Tensor
    values: Tensor

    @classmethod
    def identity(cls, attention: Attention) -> HeadOrder:
        """Everything where it is."""
        groups = attention.groups
        return cls(
            torch.arange(groups),
            torch.arange(attention.queries).repeat(groups, 1),
            torch.arange(attention.channels).repeat(groups, 1),
            torch.arange(attention.value_channels).repeat(groups, 1),
        )

    @classmethod
    def random(cls, attention: Attention, inside: Inside, generator: torch.Generator) -> HeadOrder:
        """Any that attention allows, as `head_order` might find it."""

        def draw(rows: int, size: int) -> Tensor:
            return torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])

        same, groups = cls.identity(attention), attention.groups
        values = draw(groups, attention.value_channels)
        channels = same.inside if attention.fixed else draw(groups, attention.channels)
        if inside == "joint" and channels.shape == values.shape and not attention.fixed:
            channels = values
        return cls(torch.randperm(groups, generator=generator), draw(groups, attention.queries), channels, values)

    def units(self, attention: Attention) -> dict[str, Tensor]:
        """The order of the units of query, key, value and output, by their keys."""
        heads = self.groups[:, None] * attention.queries + self.queries
        channels, values = attention.channels, attention.value_channels
        return {
            attention.key_of("query"): (heads[:, :, None] * channels + self.inside[:, None]).flatten(),
            attention.key_of("key"): (self.groups[:, None] * channels + self.inside).flatten(),
            attention.key_of("value"): (self.groups[:, None] * values + self.values).flatten(),
            attention.key_of("output"): (heads[:, :, None] * values + self.values[:, None]).flatten(),
        }


def match_by_spectrum(attention: Attention, target: Heads, source: Heads) -> HeadOrder:
    """The groups and query heads whose projections have the singular values that are nearest.

    The cost of a pair is the sum of the distances ``||s(M_B) - s(M_A)||`` over its query, key, value and output
    matrices; channels stay in their order. The order that is there stays where no other is nearer.
    """
    ours, theirs = _spectra(target), _spectra(source)
    shared = sum(torch.cdist(one, other) for one, other in zip(ours[:2], theirs[:2], strict=True))
    assert isinstance(shared, Tensor)
    single = sum(
        torch.cdist(one.flatten(0, 1), other.flatten(0, 1)) for one, other in zip(ours[2:], theirs[2:], strict=True)
    )
    assert isinstance(single, Tensor)
    groups, queries = attention.groups, attention.queries
    blocks = single.reshape(groups, queries, groups, queries).transpose(1, 2)
    inner = [[_nearest(blocks[i, j]) for j in range(groups)] for i in range(groups)]
    costs = shared + torch.tensor(
        [[-total(-blocks[i, j], inner[i][j]) for j in range(groups)] for i in range(groups)], dtype=torch.float64
    )
    order = _nearest(costs)
    same = HeadOrder.identity(attention)
    chosen = torch.stack([inner[i][int(order[i])] for i in range(groups)])
    return HeadOrder(order, chosen, same.inside, same.values)


def head_order(
    attention: Attention,
    target: Heads,
    source: Heads,
    now: HeadOrder,
    inside: Inside,
    candidates: Sequence[HeadOrder] | None,
) -> HeadOrder | None:
    """A better order of heads and channels by inner products; None where there is none.

    Args:
        now: the order that it has to be better than.
        inside: ``joint``: one order of channels for query, key and value, as published; ``separate``: one for query
            and key and another for value, which attention allows as well. Where queries and keys have to stay,
            and where value heads have another size, the latter.
        candidates: the orders of heads that are tried beside that of now; None for the best of all.
    """
    scores = _Scores(attention, target, source, joint=inside == "joint")
    tried = [scores.with_best_heads(now)] if candidates is None else [now, *candidates]
    found = [one if candidates is None else scores.with_best_channels(one) for one in tried]
    reached = [scores.total(one) for one in found]
    best = max(range(len(found)), key=reached.__getitem__)  # the first of equals
    return found[best] if reached[best] - scores.total(now) > TIE * scores.scale else None


class _Scores:
    """Inner products of the channels of all pairs of groups."""

    def __init__(self, attention: Attention, target: Heads, source: Heads, *, joint: bool) -> None:
        self._attention = attention
        self._joint = joint and not attention.fixed and attention.channels == attention.value_channels
        self._target, self._source = target, source
        self._pairs: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        norms = [one.norm() * other.norm() for one, other in zip(_all(target), _all(source), strict=True)]
        self.scale = float(sum(norms))

    def total(self, order: HeadOrder) -> float:
        """The inner product of all heads in an order."""
        rows = zip(order.groups.tolist(), order.queries, order.inside, order.values, strict=True)
        return sum(self.of(i, *row) for i, row in enumerate(rows))

    def with_best_channels(self, order: HeadOrder) -> HeadOrder:
        """The same heads with the best order of their channels."""
        pairs = zip(order.groups.tolist(), order.queries, strict=True)
        channels = [self.best_channels(i, j, queries) for i, (j, queries) in enumerate(pairs)]
        inside, values = (torch.stack([one[kind] for one in channels]) for kind in range(2))
        return HeadOrder(order.groups, order.queries, inside, values)

    def with_best_heads(self, now: HeadOrder) -> HeadOrder:
        """The best order of heads and channels; that of now where no other order of groups is better."""
        groups = range(self._attention.groups)
        found = [[self.best(i, j) for j in groups] for i in groups]
        values = torch.tensor([[self.of(i, j, *found[i][j]) for j in groups] for i in groups], dtype=torch.float64)
        order = best_assignment(values)
        order = order if is_better(values, order, now.groups) else now.groups
        chosen = [found[i][j] for i, j in enumerate(order.tolist())]
        queries, inside, channels = (torch.stack([one[kind] for one in chosen]) for kind in range(3))
        return HeadOrder(order, queries, inside, channels)

    def of(self, i: int, j: int, queries: Tensor, inside: Tensor, values: Tensor) -> float:
        """The inner product of target group i and source group j in an order."""
        first, second = self._channels(i, j, queries)
        return total(first, inside) + total(second, values)

    def best_channels(self, i: int, j: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The best orders of channels for given query heads."""
        first, second = self._channels(i, j, queries)
        if self._joint:
            order = _best(first + second)
            return order, order
        return torch.arange(len(first)) if self._attention.fixed else _best(first), _best(second)

    def best(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query heads and channels, found in turn until they stay."""
        queries = torch.arange(self._attention.queries)
        channels = self.best_channels(i, j, queries)
        for _ in range(_ALTERNATIONS):
            inside, values = channels
            rows = torch.arange(len(inside)), torch.arange(len(values))
            query, _, _, output = self._pair(i, j)
            products = query[:, :, rows[0], inside].sum(-1) + output[:, :, rows[1], values].sum(-1)
            found = best_assignment(products)
            if not is_better(products, found, queries):
                break
            queries = found
            channels = self.best_channels(i, j, queries)
        return queries, *channels

    def _channels(self, i: int, j: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, output = self._pair(i, j)
        rows = torch.arange(len(queries))
        return key + query[rows, queries].sum(0), value + output[rows, queries].sum(0)

    def _pair(self, i: int, j: int) -> tuple[Tensor, ...]:
        """Products of all channels of two groups; of query heads (queries, queries, channels, channels)."""
        if (i, j) not in self._pairs:
            ours, theirs = self._target, self._source
            self._pairs[i, j] = (
                torch.einsum("arf,bsf->abrs", ours.query[i], theirs.query[j]),
                ours.key[i] @ theirs.key[j].T,
                ours.value[i] @ theirs.value[j].T,
                torch.einsum("arf,bsf->abrs", ours.output[i], theirs.output[j]),
            )
        return self._pairs[i, j]


def _best(products: Tensor) -> Tensor:
    found, same = best_assignment(products), torch.arange(len(products))
    return found if is_better(products, found, same) else same


def _nearest(costs: Tensor) -> Tensor:
    return _best(-costs)


def _all(heads: Heads) -> Sequence[Tensor]:
    return heads.key, heads.value, heads.query, heads.output


def _spectra(heads: Heads) -> list[Tensor]:
    return [torch.linalg.svdvals(matrices) for matrices in _all(heads)]
