"""Output tensors that are made element by element, in one pass over their bytes and without torch.

What a work item's expression does is recorded once (:mod:`mergekit_px.kernels.tracing`), compiled
(:mod:`mergekit_px.kernels.native`), and run over pieces that fit the cache: read, compute, and on to the output. Where
anything is not of this kind, or a value is not finite, the item goes the way of all others, which also words the error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.values import Block
from mergekit_px.kernels import native
from mergekit_px.kernels.random import drawn, stream_key
from mergekit_px.kernels.tracing import Program, Traced
from mergekit_px.methods.declare import Extent, RandomStream
from mergekit_px.methods.pruning import RankSweep
from mergekit_px.plan.budget import BLOCK, needs_whole
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Drawn, Leaf, Node, Read
from mergekit_px.stages import timed
from mergekit_px.storage.scaled import Floats, Scaled

_PIECE = 1 << 16
"""Elements that are read and computed at a time: what stands between the file and the output stays in the cache."""

_COPY_BYTES = 8 << 20

_DRAWN_TYPE, _DRAWN_BYTES = "F32", 4
"""What random numbers are before they are rounded."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_ALIGNMENT = 64


class Sink(Protocol):
    """Where output bytes go."""

    def done(self, name: str, start: int, stop: int) -> bool: ...

    def write(self, name: str, start: int, buffer: memoryview) -> None: ...


class Buffers(threading.local):
    """Memory that each thread reuses, by what it is for."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    def bytes(self, role: str, count: int) -> Bytes:
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
class Trace:
    program: Program
    leaves: tuple[int, ...]
    """Which leaves of the item the program reads, in its order."""
    streams: tuple[tuple[str, int], ...]
    """Step and source of each stream of random numbers."""
    results: tuple[int, ...]
    """Where the program's values are."""


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
    _traces: dict[Any, Trace | None] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=Buffers)

    def covers(self, item: WorkItem) -> bool:
        """Whether nothing else is needed for an item."""
        if item.action == "copy" or not item.elements:
            return True
        return self.trace(item, _simple_statistics(item)) is not None

    def routine(self, item: WorkItem) -> Routine[Any]:
        """Everything that makes an item that is covered."""
        if item.action == "copy":
            nbytes = item.elements * item.dtype.bits // 8
            yield [Job(partial(self._copy, item, *span)) for span in self._left(item, nbytes, _COPY_BYTES, 1)]
            return
        statistics = _simple_statistics(item) or {}
        yield [Job(partial(self._write_or_fall_back, item, statistics, *chunk)) for chunk in self.left(item)]

    def left(self, item: WorkItem) -> Iterator[tuple[int, int]]:
        """The chunks of an item, in elements, that are still to be written; the others are told as progress."""
        length = max(self.chunk // BLOCK, 1) * BLOCK
        return self._left(item, item.elements, length, item.dtype.bits // 8)

    def _left(self, item: WorkItem, size: int, length: int, width: int) -> Iterator[tuple[int, int]]:
        for start in range(0, size, length):
            stop = min(start + length, size)
            if self.sink.done(item.name, start * width, stop * width):
                self.advance(item.name, (stop - start) * width)
            else:
                yield start, stop

    def _copy(self, item: WorkItem, start: int, stop: int, lane: Any) -> None:
        read = item.reads[0]
        buffer = self.buffers.bytes("copy", stop - start)[: stop - start].data
        self.readers[read.input].read_into(read.tensor, start, buffer)
        self.sink.write(item.name, start, buffer)
        self.advance(item.name, stop - start)

    def _write_or_fall_back(
        self, item: WorkItem, statistics: Mapping[int, Any], start: int, stop: int, lane: Any
    ) -> None:
        if not self.write(item, start, stop, statistics):
            self.fall_back(item, start, stop)

    def write(self, item: WorkItem, start: int, stop: int, statistics: Mapping[int, Any]) -> bool:
        """Write elements [start, stop) of an item; False, and nothing is written, where that is not for this class."""
        return write_together([(self, item, statistics)], start, stop)

    def runner(
        self, item: WorkItem, trace: Trace, kernel: native.Kernel, pieces: Pieces, prefixes: Sequence[int] = ()
    ) -> Callable[[int, int, int], tuple[int, int]] | None:
        """Computes on a piece that was read: from its first element, their number and where the output is, to the
        largest magnitudes of inputs and output as bits. None where torch is to decode an input."""
        buffers: list[np.ndarray[Any, Any]] = []
        for place in trace.leaves:
            held = pieces.of(item.leaves[place], self.seed)
            if held is None:
                return None
            buffers += held
        streams = [stream_key(self.seed, f"{step}/{item.name}", source) for step, source in trace.streams]
        numbers = np.array(trace.program.numbers or [0.0])
        keys = np.array([*streams, *prefixes] or [0], dtype=np.int64)
        maxima = np.zeros(2, dtype=np.uint32 if trace.program.type == "float" else np.uint64)
        arrays = [numbers, keys, maxima, *buffers]
        # Found once: for each piece they would take as long as the arithmetic.
        numbers_at, keys_at, maxima_at, *inputs_at = [array.ctypes.data for array in arrays]

        def run(begin: int, count: int, output: int) -> tuple[int, int]:
            with timed("arithmetic"):
                kernel.call(output, numbers_at, keys_at, begin, count, maxima_at, *inputs_at)
            return int(arrays[2][0]), int(arrays[2][1])

        return run

    def count(
        self, item: WorkItem, node: Apply, sweep: RankSweep, start: int, stop: int, statistics: Mapping[int, Any]
    ) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """What a sweep of a search for ranks counts over elements [start, stop); None where torch is to do it."""
        if (
            item.wide
            or start % native.LANES
            or not self._takes(item)
            or getattr(sweep.search.dtype, "itemsize", 4) != 4
        ):
            return None
        traced = _traced(item, statistics, lambda block: sweep.values(block.operands(node)))
        if traced is None or traced.streams:
            return None
        shift, size = sweep.search.digits()
        targets = list(dict.fromkeys((target.source, target.prefix >> shift) for target in sweep.search.targets))
        counting = native.Counting(tuple(traced.results[source] for source, _ in targets), shift, size)
        kernel = native.compiled(traced.program, counting)
        pieces = Pieces(self, start, stop)
        run = self.runner(item, traced, kernel, pieces, [prefix for _, prefix in targets])
        if run is None:
            return None
        counts, last = np.zeros((2, len(targets), size + 1), dtype=np.int32)
        for begin in range(start, stop, _PIECE):
            count = min(_PIECE, stop - begin)
            pieces.read(begin, count)
            if run(begin, count, counts.ctypes.data)[0] >= kernel.limit:
                return None
        if spare := (start - stop) % native.LANES:
            # The last element was repeated to fill its vector; a vector of it alone tells where it counts.
            pieces.read(stop - 1, 1)
            run(stop - 1, 1, last.ctypes.data)
            counts -= last // native.LANES * spare
        rows = {target: row[:size] for target, row in zip(targets, counts, strict=True)}
        found = [rows[target.source, target.prefix >> shift] for target in sweep.search.targets]
        return np.concatenate([*found, [stop - start, 0]]).astype(np.int64)

    def trace(self, item: WorkItem, statistics: Mapping[int, Any] | None) -> Trace | None:
        """How the item's value is made; None where it cannot be told, or not so."""
        if statistics is None or not self._takes(item):
            return None
        try:
            key = (_signature(item.node, item, statistics, {}), item.dtype.name, item.wide)
            if key not in self._traces:
                self._traces[key] = _traced(item, statistics, _value(item))
            return self._traces[key]
        except TypeError:  # parameters that cannot be compared
            return _traced(item, statistics, _value(item))

    def _takes(self, item: WorkItem) -> bool:
        """Whether all that is read is decoded here, and may be cut anywhere once statistics are known."""
        plain = not (item.adapted or item.encoding) and item.dtype.name in native.STORED
        if self.allow_nonfinite or not plain or not item.leaves or not native.is_available():
            return False
        if not all(map(_is_decoded_here, item.leaves)):
            return False
        return not needs_whole(item) and all(node.access != "rows" for node in item.applied)


class Pieces:
    """Pieces of stored tensors, each read once for all that is computed on it; they are of elements [start, stop)."""

    def __init__(self, items: FusedItems, start: int, stop: int) -> None:
        self._items = items
        self._start = start
        self._stop = stop
        self._stored: dict[Leaf, tuple[Callable[[int, memoryview], None], int, Bytes]] = {}
        self._scales: dict[Leaf, tuple[Floats, Floats]] = {}
        """Of decoded tensors: the scales of all their vectors, and where those of a piece will be."""

    def of(self, leaf: Leaf, seed: int) -> list[np.ndarray[Any, Any]] | None:
        """Where the pieces of a leaf will be: elements as stored, and one scale for each vector of what is decoded."""
        if isinstance(leaf, Drawn) and leaf not in self._stored:
            buffer = self._items.buffers.bytes(f"read {len(self._stored)}", _PIECE * _DRAWN_BYTES)
            self._stored[leaf] = partial(_draw, leaf, seed), _DRAWN_BYTES, buffer
        if leaf not in self._stored:
            read = leaf.parts[0] if isinstance(leaf, Decoded) else leaf
            assert isinstance(read, Read)
            width, role = read.dtype.bits // 8, f"read {len(self._stored)}"
            if isinstance(leaf, Decoded):
                scales = self._vector_scales(leaf)
                if scales is None:
                    return None
                buffer = self._items.buffers.bytes(f"{role} scales", _PIECE // native.LANES * scales.itemsize)
                self._scales[leaf] = scales, buffer.view(np.float32)
            buffer = self._items.buffers.bytes(role, _PIECE * width)
            self._stored[leaf] = partial(self._items.readers[read.input].read_into, read.tensor), width, buffer
        return [self._stored[leaf][2], *(self._scales[leaf][1:] if leaf in self._scales else ())]

    def _vector_scales(self, leaf: Decoded) -> Floats | None:
        reader = self._items.readers[leaf.parts[0].input]

        def read(tensor: StoredTensor, begin: int, end: int) -> Bytes:
            width = tensor.dtype.bits // 8
            buffer = np.empty((end - begin) * width, dtype=np.uint8)
            reader.read_into(tensor, begin * width, buffer.data)
            return buffer

        assert isinstance(leaf.encoding, Scaled)
        return leaf.encoding.vector_scales(read, self._start, self._stop, native.LANES)

    def read(self, begin: int, count: int) -> None:
        """Read ``count`` elements of each from ``begin`` on."""
        spare = -count % native.LANES
        for read, width, buffer in self._stored.values():
            stop = count * width
            read(begin * width, buffer[:stop].data)
            if spare:  # the last element fills its vector
                buffer[stop : stop + spare * width] = np.tile(buffer[stop - width : stop], spare)
        first = (begin - self._start) // native.LANES
        for scales, held in self._scales.values():
            some = scales[first : first + -(-count // native.LANES)]
            held[: len(some)] = some


def write_together(members: Sequence[tuple[FusedItems, WorkItem, Mapping[int, Any]]], start: int, stop: int) -> bool:
    """Write elements [start, stop) of items of several outputs, whose leaves are the same objects where they are the
    same tensors: what they share is read once. False, and nothing is written, where one is not for this class."""
    first = members[0][0]
    pieces = Pieces(first, start, stop)
    made = []
    for number, (fused, item, statistics) in enumerate(members):
        trace = fused.trace(item, statistics)
        if trace is None or start % native.LANES:
            return False
        kernel = native.compiled(trace.program, item.dtype.name)
        out = first.buffers.bytes(f"output {number}", (stop - start) * (item.dtype.bits // 8))
        run = fused.runner(item, trace, kernel, pieces)
        if run is None:
            return False
        made.append((run, out, out.ctypes.data, item.dtype.bits // 8, kernel.limit, _limit(item, kernel.limit)))
    for begin in range(start, stop, _PIECE):
        count = min(_PIECE, stop - begin)
        pieces.read(begin, count)
        for run, _, address, width, infinity, limit in made:
            magnitudes = run(begin, count, address + (begin - start) * width)
            if magnitudes[0] >= infinity or magnitudes[1] > limit:
                return False
    for (fused, item, _), (_, out, _, width, *_) in zip(members, made, strict=True):
        nbytes = (stop - start) * width
        fused.sink.write(item.name, start * width, out[:nbytes].data)
        fused.advance(item.name, nbytes)
    return True


def _draw(leaf: Drawn, seed: int, start: int, buffer: memoryview) -> None:
    """Random numbers as if they were stored."""
    numbers = np.frombuffer(buffer, dtype=np.float32)
    first = start // _DRAWN_BYTES
    np.multiply(drawn(seed, leaf.stream, first, numbers.size, leaf.distribution), np.float32(leaf.scale), out=numbers)


def _is_decoded_here(leaf: Leaf) -> bool:
    if isinstance(leaf, Decoded):
        return isinstance(leaf.encoding, Scaled) and _stored_type(leaf) in native.CODES
    return isinstance(leaf, Drawn) or (isinstance(leaf, Read) and _stored_type(leaf) in native.LOADED)


def _stored_type(leaf: Leaf) -> str:
    if isinstance(leaf, Drawn):
        return _DRAWN_TYPE
    return (leaf.encoding.parts["codes"] if isinstance(leaf, Decoded) else leaf).dtype.name


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
    if isinstance(node, Read | Decoded | Drawn):
        return _stored_type(node), type(node).__name__, node.kind
    assert isinstance(node, Apply)
    told = (item.name, item.shape) if node.method.arguments & {"name", "shape"} else None
    operands = tuple(_signature(operand, item, statistics, known) for operand in node.operands)
    made = statistics.get(id(node))
    hash(made)
    parts = (node.step, node.method.name, node.params, node.weights, node.source_indices, node.kind, made, told)
    return *parts, node.base is None, operands


def _value(item: WorkItem) -> Callable[[Block], Any]:
    return lambda block: [block.value(item.node)]


def _traced(item: WorkItem, statistics: Mapping[int, Any], evaluate: Callable[[Block], Any]) -> Trace | None:
    """The program of what is evaluated on a block of an item; None where it cannot be recorded."""
    program = Program("double" if item.wide else "float")
    leaves: list[int] = []
    streams: list[tuple[str, int]] = []

    def load(leaf: Leaf) -> Any:
        leaves.append(item.leaves.index(leaf))
        return (program.scaled if isinstance(leaf, Decoded) else program.input)(_stored_type(leaf))

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
