"""Output tensors that are made element by element, in one pass over their bytes and without torch.

What a work item's expression does is recorded once (:mod:`mergekit_px.kernels.tracing`), compiled
(:mod:`mergekit_px.kernels.native`), and run over pieces that fit the cache: read, compute, and on to the output. Where
anything is not of this kind, or a value is not finite, the item goes the way of all others, which also words the error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.values import Block
from mergekit_px.kernels import native
from mergekit_px.kernels.random import stream_key
from mergekit_px.kernels.tracing import Program, Traced
from mergekit_px.methods.declare import Extent, RandomStream
from mergekit_px.plan.budget import BLOCK, needs_whole
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Leaf, Node, Read
from mergekit_px.stages import timed

_PIECE = 1 << 16
"""Elements that are read and computed at a time: what stands between the file and the output stays in the cache."""

_COPY_BYTES = 8 << 20
_ALIGNMENT = 64


class Sink(Protocol):
    """Where output bytes go."""

    def done(self, name: str, start: int, stop: int) -> bool: ...

    def write(self, name: str, start: int, buffer: memoryview) -> None: ...


class Buffers(threading.local):
    """Memory that each thread reuses, by what it is for."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def bytes(self, role: str, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``count`` bytes, aligned, and some more behind them; their old contents are lost."""
        held = self._held.get(role)
        if held is None or held.size < count + _SPARE:
            whole = np.empty(count + _SPARE + _ALIGNMENT, dtype=np.uint8)
            skip = -whole.ctypes.data % _ALIGNMENT
            held = self._held[role] = whole[skip : skip + count + _SPARE]
        return held


_SPARE = native.LANES * 8
"""Room behind the elements of a buffer for the rest of a vector."""


@dataclass(frozen=True)
class _Trace:
    program: Program
    leaves: tuple[int, ...]
    """Which leaves of the item the program reads, in its order."""
    streams: tuple[tuple[str, int], ...]
    """Step and source of each stream of random numbers."""


@dataclass
class FusedItems:
    """The items of a run that can be made so, and how. Arguments are those of ``Execution``."""

    readers: Mapping[str, TensorReader]
    sink: Sink
    chunk: int
    seed: int
    allow_nonfinite: bool
    advance: Callable[[str, int], None]
    fall_back: Callable[[WorkItem, int, int], None]
    """Writes elements of an item that is covered in another way."""
    _traces: dict[Any, _Trace | None] = field(default_factory=dict)
    _buffers: Buffers = field(default_factory=Buffers)

    def covers(self, item: WorkItem) -> bool:
        """Whether nothing else is needed for an item."""
        if item.action == "copy" or not item.elements:
            return True
        return self._trace(item, _simple_statistics(item)) is not None

    def routine(self, item: WorkItem) -> Routine[Any]:
        """Everything that makes an item that is covered."""
        if item.action == "copy":
            yield [Job(partial(self._copy, item, start, stop)) for start, stop in self._left(item, _COPY_BYTES)]
            return
        width = item.dtype.bits // 8
        length = max(self.chunk // BLOCK, 1) * BLOCK * width
        yield [
            Job(partial(self._write_or_fall_back, item, start // width, stop // width))
            for start, stop in self._left(item, length)
        ]

    def _left(self, item: WorkItem, length: int) -> list[tuple[int, int]]:
        """The byte ranges of an item that are still to be written; the others are told as progress."""
        nbytes = item.elements * item.dtype.bits // 8
        found = []
        for start in range(0, nbytes, length):
            stop = min(start + length, nbytes)
            if self.sink.done(item.name, start, stop):
                self.advance(item.name, stop - start)
            else:
                found.append((start, stop))
        return found

    def _copy(self, item: WorkItem, start: int, stop: int, lane: Any) -> None:
        read = item.reads[0]
        buffer = self._buffers.bytes("copy", stop - start)[: stop - start].data
        self.readers[read.input].read_into(read.tensor, start, buffer)
        self.sink.write(item.name, start, buffer)
        self.advance(item.name, stop - start)

    def _write_or_fall_back(self, item: WorkItem, start: int, stop: int, lane: Any) -> None:
        if not self.write(item, start, stop, _simple_statistics(item) or {}):
            self.fall_back(item, start, stop)

    def write(self, item: WorkItem, start: int, stop: int, statistics: Mapping[int, Any]) -> bool:
        """Write elements [start, stop) of an item; False, and nothing is written, where that is not for this class."""
        trace = self._trace(item, statistics)
        if trace is None or start % 2:
            return False
        kernel = native.compiled(trace.program, item.dtype.name)
        reads = [item.leaves[place] for place in trace.leaves]
        width = item.dtype.bits // 8
        out = self._buffers.bytes("output", (stop - start) * width)
        numbers = np.array(trace.program.numbers or [0.0])
        keys = np.array([stream_key(self.seed, f"{step}/{item.name}", source) for step, source in trace.streams] or [0])
        maxima = np.zeros(2, dtype=np.uint64)
        if trace.program.type == "float":
            maxima = maxima.view(np.uint32)
        limit = _limit(item, kernel.limit)
        for begin in range(start, stop, _PIECE):
            count = min(_PIECE, stop - begin)
            inputs = [self._read(number, read, begin, count) for number, read in enumerate(reads)]
            with timed("arithmetic"):
                place = out.ctypes.data + (begin - start) * width
                kernel.call(place, numbers.ctypes.data, keys.ctypes.data, begin, count, maxima.ctypes.data, *inputs)
            if maxima[0] >= kernel.limit or maxima[1] > limit:
                return False
        nbytes = (stop - start) * width
        self.sink.write(item.name, start * width, out[:nbytes].data)
        self.advance(item.name, nbytes)
        return True

    def _read(self, number: int, read: Leaf, begin: int, count: int) -> int:
        """Where some elements of a stored tensor have been read to; the last one is repeated to fill a vector."""
        assert isinstance(read, Read)
        width = read.dtype.bits // 8
        buffer = self._buffers.bytes(f"read {number}", _PIECE * width)
        self.readers[read.input].read_into(read.tensor, begin * width, buffer[: count * width].data)
        spare = -count % native.LANES
        if spare:
            last = buffer[(count - 1) * width : count * width]
            buffer[count * width : (count + spare) * width] = np.tile(last, spare)
        return buffer.ctypes.data

    def _trace(self, item: WorkItem, statistics: Mapping[int, Any] | None) -> _Trace | None:
        """How the item's value is made; None where it cannot be told, or not so."""
        if statistics is None or self.allow_nonfinite or not _is_elementwise(item) or not native.is_available():
            return None
        try:
            key = (_signature(item.node, item, statistics, {}), item.dtype.name, item.wide)
            if key not in self._traces:
                self._traces[key] = _traced(item, statistics)
            return self._traces[key]
        except TypeError:  # parameters that cannot be compared
            return _traced(item, statistics)


def _is_elementwise(item: WorkItem) -> bool:
    """Whether all that is read is stored plainly, and may be cut anywhere once statistics are known."""
    if item.adapted or item.views or item.dtype.name not in native.LOADED or not item.leaves:
        return False
    if any(read.dtype.name not in native.LOADED for read in item.reads):
        return False
    return not needs_whole(item) and all(node.access != "rows" for node in item.applied)


def _limit(item: WorkItem, infinity: int) -> int:
    """The bits of the largest magnitude that the storage type of the result holds."""
    largest = item.dtype.max_finite or math.inf
    if item.wide:
        return min(infinity - 1, int(np.float64(largest).view(np.uint64)))
    with np.errstate(over="ignore"):
        return min(infinity - 1, int(np.float32(largest).view(np.uint32)))


def _simple_statistics(item: WorkItem) -> dict[int, Any] | None:
    """The statistics of an item's methods where none of them looks at a value; else None."""
    found: dict[int, Any] = {}
    for node in item.applied:
        if node.method.statistics is None:
            continue
        extent = Extent(len(node.sources), item.elements, node.weights, node.params)
        generator: Generator[Any, Any, Any] = node.method.statistics(extent)
        try:
            next(generator)
        except StopIteration as finished:
            found[id(node)] = finished.value
        else:
            generator.close()
            return None
    return found


def _signature(node: Node, item: WorkItem, statistics: Mapping[int, Any], known: dict[int, int]) -> Any:
    """What an expression's program follows from; equal for tensors that are treated alike."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = len(known)
    if isinstance(node, Read):
        return node.dtype.name, node.kind
    assert isinstance(node, Apply)
    told = (item.name, item.shape) if node.method.arguments & {"name", "shape"} else None
    operands = tuple(_signature(operand, item, statistics, known) for operand in node.operands)
    made = statistics.get(id(node))
    hash(made)
    parts = (node.step, node.method.name, node.params, node.weights, node.source_indices, node.kind, made, told)
    return *parts, node.base is None, operands


def _traced(item: WorkItem, statistics: Mapping[int, Any]) -> _Trace | None:
    program = Program("double" if item.wide else "float")
    leaves: list[int] = []
    streams: list[tuple[str, int]] = []

    def load(leaf: Leaf) -> Any:
        leaves.append(item.leaves.index(leaf))
        return program.input(leaf.dtype.name)

    def no_factors(node: Any) -> Any:
        raise NotImplementedError

    class Recorder(Block):
        def _random(self, node: Apply, like: Any) -> RandomStream:
            return _TracedRandom(program, streams, node.step, node.source_indices)

    try:
        block = Recorder(item.name, 0, load, no_factors, statistics, 0, item.shape, item.elements)
        value: Any = block.value(item.node)
        if not isinstance(value, Traced) or value.kind != program.type:
            return None
        program.result = value.place
    except Exception:  # whatever a method does that cannot be recorded; torch will do it, or word the error
        return None
    return _Trace(program, tuple(leaves), tuple(streams))


class _TracedRandom:
    def __init__(self, program: Program, streams: list[tuple[str, int]], step: str, indices: Sequence[int]) -> None:
        self._program = program
        self._streams = streams
        self._step = step
        self._indices = indices

    def uniform(self, source: int) -> Any:
        self._streams.append((self._step, self._indices[source]))
        return self._program.uniform(0)
