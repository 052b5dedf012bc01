"""Which rows and columns of a model's tensors have to be permuted together.

A part is a set of positions along one axis of one tensor. Parts in one list stand for the same units (channels of the
residual stream, hidden units of an MLP, channels of heads): if all of them are put into another order, the model
computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
