"""Which rows and columns of a model's tensors have to be permuted together, permutations, and the file that holds them.

A part is a set of positions along one axis of one tensor. Parts in one list stand for the same units (channels of the
residual stream, hidden units of an MLP, channels of heads): if all of them are put into another order, the model
computes what it did before.

``rebasin.safetensors`` holds, for each permuted axis of each tensor, ``NAME.axisN``: int64 positions, so that position
``i`` of the result is position ``order[i]`` of the original. Nothing else is needed to apply them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RESIDUAL = "residual"


@dataclass(frozen=True, eq=False)
class Part:
    """Positions ``rows`` along an axis of a tensor, in the order of the units that they belong to."""

    tensor: str
    axis: int
    rows: Tensor


@dataclass(eq=False)
class Hidden:
    """The hidden units of one MLP."""

    name: str
    size: int
    parts: list[Part]

    @property
    def key(self) -> str:
        return f"{self.name}hidden"


@dataclass(eq=False)
class Attention:
    """The heads of one attention layer: ``groups`` of one key and value head and ``queries`` query heads each.

    ``query`` has groups * queries * channels units, ``key`` groups * channels, ``value`` groups * value_channels and
    ``output`` groups * queries * value_channels. ``fixed``: the channels of queries and keys stay where they are.
    """

    name: str
    groups: int
    queries: int
    channels: int
    value_channels: int
    fixed: bool
    query: list[Part]
    key: list[Part]
    value: list[Part]
    output: list[Part]

    def key_of(self, kind: str) -> str:
        """The key of the units of query, key, value or output."""
        return f"{self.name}{kind}"

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with the key of its units."""
        for kind, parts in (("query", self.query), ("key", self.key), ("value", self.value), ("output", self.output)):
            for part in parts:
                yield self.key_of(kind), part


@dataclass(eq=False)
class Layout:
    """All that may be permuted.

    Attributes:
        width: channels of the residual stream; 0 where it stays.
        square: tensors that have it on both sides, which no assignment problem can score.
        left_alone: blocks that keep their order, and why.
    """

    width: int = 0
    residual: list[Part] = field(default_factory=list)
    square: set[str] = field(default_factory=set)
    hidden: list[Hidden] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with the key of its units."""
        for part in self.residual:
            yield RESIDUAL, part
        for hidden in self.hidden:
            for part in hidden.parts:
                yield hidden.key, part
        for attention in self.attention:
            yield from attention.parts()


Units = Mapping[str, Tensor]
"""The key of some units -> which unit of the source stands at each place in the target."""

Orders = dict[tuple[str, int], Tensor]
"""Tensor and axis -> positions."""


class Permutations:
    """What is done to a task vector: each axis in another order.

    Attributes:
        orders: int64, by tensor and axis.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._axes: dict[str, dict[int, Tensor]] = {}
        for (name, axis), order in orders.items():
            self._axes.setdefault(name, {})[axis] = order

    @classmethod
    def of_units(cls, layout: Layout, shapes: Mapping[str, tuple[int, ...]], units: Units) -> Permutations:
        """What an order of the units makes of the axes that they lie on."""
        orders: Orders = {}
        for key, part in layout.parts():
            place = (part.tensor, part.axis)
            order = orders.setdefault(place, torch.arange(shapes[part.tensor][part.axis]))
            order[part.rows] = part.rows[units[key]]
        return cls(orders)

    def permute(self, name: str, tensor: Tensor, *, but: int | None = None) -> Tensor:
        """A tensor with its axes permuted, except one."""
        for axis, order in self._axes.get(name, {}).items():
            if axis != but:
                tensor = tensor.index_select(axis, order.to(tensor.device))
        return tensor

    def transport(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task vector with all axes permuted; tensors that no permutation concerns are as they were."""
        return {name: self.permute(name, delta) for name, delta in deltas.items()}

    def moved(self) -> float:
        """Share of all positions that hold another one."""
        moved = sum(int((order != torch.arange(len(order))).sum()) for order in self.orders.values())
        return moved / max(1, sum(len(order) for order in self.orders.values()))

    def arrays(self) -> dict[str, Tensor]:
        """As they are written to a file."""
        return {f"{name}.axis{axis}": order for (name, axis), order in self.orders.items()}


def identity_units(layout: Layout) -> dict[str, Tensor]:
    """Every unit where it is."""
    return {key: torch.arange(len(part.rows)) for key, part in layout.parts()}
