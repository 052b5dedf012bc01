"""What a work item's expression does, recorded as a program of elementwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_px.execute.values import Block
from mergekit_px.kernels.tracing import Program, Traced
from mergekit_px.methods.declare import RandomStream
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Drawn, Leaf, Node, Read

_DRAWN_TYPE = "F32"
"""What random numbers are before they are rounded."""


@dataclass(frozen=True)
class Trace:
    program: Program
    leaves: tuple[int, ...]
    """Which leaves of the item the program reads, in its order."""
    streams: tuple[tuple[str, int], ...]
    """Step and source of each stream of random numbers."""
    results: tuple[int, ...]
    """Where the program's values are."""


def stored_type(leaf: Leaf) -> str:
    if isinstance(leaf, Drawn):
        return _DRAWN_TYPE
    return (leaf.encoding.parts["codes"] if isinstance(leaf, Decoded) else leaf).dtype.name


def signature(node: Node, item: WorkItem, statistics: Mapping[int, Any], known: dict[int, int]) -> Any:
    """What an expression's program follows from; equal for tensors that are treated alike."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = len(known)
    if isinstance(node, Read | Decoded | Drawn):
        return stored_type(node), type(node).__name__, node.kind
    assert isinstance(node, Apply)
    told = (item.name, item.shape) if node.method.arguments & {"name", "shape"} else None
    operands = tuple(signature(operand, item, statistics, known) for operand in node.operands)
    made = statistics.get(id(node))
    hash(made)
    parts = (node.step, node.method.name, node.params, node.weights, node.source_indices, node.kind, made, told)
    return *parts, node.base is None, operands


def value_of(item: WorkItem) -> Callable[[Block], Any]:
    return lambda block: [block.value(item.node)]


def recorded(item: WorkItem, statistics: Mapping[int, Any], evaluate: Callable[[Block], Any]) -> Trace | None:
    """The program of what is evaluated on a block of an item; None where it cannot be recorded."""
    program = Program("double" if item.wide else "float")
    leaves: list[int] = []
    streams: list[tuple[str, int]] = []

    def load(leaf: Leaf) -> Any:
        leaves.append(item.leaves.index(leaf))
        return (program.scaled if isinstance(leaf, Decoded) else program.input)(stored_type(leaf))

    def no_factors(node: Any) -> Any:
        raise NotImplementedError

    class Recorder(Block):
        def _random(self, node: Apply, like: Any) -> RandomStream:
            return _TracedRandom(program, streams, node.step, node.source_indices)

    try:
        block = Recorder(item.name, 0, load, no_factors, statistics, 0, item.shape, item.elements)
        values = list(evaluate(block))
        results = tuple(value.place for value in values if isinstance(value, Traced) and value.kind == program.type)
    except Exception:  # whatever a method does that cannot be recorded; torch will do it, or word the error
        return None
    if len(results) != len(values):
        return None
    program.result = results[0]
    return Trace(program, tuple(leaves), tuple(streams), results)


class _TracedRandom:
    def __init__(self, program: Program, streams: list[tuple[str, int]], step: str, indices: Sequence[int]) -> None:
        self._program = program
        self._streams = streams
        self._step = step
        self._indices = indices

    def uniform(self, source: int) -> Any:
        self._streams.append((self._step, self._indices[source]))
        return self._program.uniform(0)
