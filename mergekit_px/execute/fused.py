"""Output tensors that are made element by element, in one pass over their bytes and without torch.

What a work item's expression does is recorded once (:mod:`mergekit_px.kernels.tracing`), compiled
(:mod:`mergekit_px.kernels.native`), and run over pieces that fit the cache: read, compute, and on to the output. Where
anything is not of this kind, or a value is not finite, the item goes the way of all others, which also words the error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.checkpoint.reader import Ahead, FileReader, TensorReader
from mergekit_px.execute.recording import Trace, recorded, signature, stored_type, value_of
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.sweeps import Totals, statistics_generator
from mergekit_px.execute.values import Block
from mergekit_px.kernels import native
from mergekit_px.kernels.random import drawn, stream_key
from mergekit_px.kernels.reduction import ROW, gram_of_rows
from mergekit_px.kernels.selection import RankSearch
from mergekit_px.methods.declare import Sweep
from mergekit_px.methods.pruning import RankSweep
from mergekit_px.methods.sphere import DotProducts
from mergekit_px.plan.budget import BLOCK, DEFAULT_CHUNK, needs_whole
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Drawn, Leaf, Read
from mergekit_px.stages import timed
from mergekit_px.storage.scaled import Floats, Scaled

_PIECE = 1 << 16
"""Elements that are read and computed at a time: what stands between the file and the output stays in the cache."""

_COPY_BYTES = 8 << 20

_DRAWN_BYTES = 4
"""Of a random number before it is rounded."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Member = tuple[WorkItem, Apply]
_ALIGNMENT = 64

_SWEPT = 64 * BLOCK
"""Elements that a job sweeps: nothing of them is kept, and adding up thousands of counters takes time."""

_MOST_SUMMED = 8
"""Sources whose dot products are summed here: the sums of their 36 pairs take 1.2 MB, which a core's cache holds."""


class Sink(Protocol):
    """Where output bytes go."""

    def done(self, name: str, start: int, stop: int) -> bool: ...

    def write(self, name: str, start: int, buffer: memoryview) -> None: ...


class ByTorch(Protocol):
    """What makes items of every kind."""

    def write_chunk(self, item: WorkItem, start: int, stop: int, lane: Any) -> None: ...

    def sweep_chunk(
        self, item: WorkItem, node: Apply, sweep: Sweep, start: int, stop: int, number: int, sums: Totals, lane: Any
    ) -> None: ...


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


@dataclass
class FusedItems:
    """The items of a run that can be made so, and how. Arguments are those of ``Execution``."""

    readers: Mapping[str, TensorReader]
    sink: Sink
    chunk: int
    seed: int
    allow_nonfinite: bool
    advance: Callable[[str, int], None]
    by_torch: Callable[[Mapping[int, Any]], tuple[ByTorch, Any]]
    """Makes what does the same by torch, with statistics that are known, and its lane."""
    _traces: dict[Any, Trace | None] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=Buffers)
    statistics: dict[int, Any] = field(default_factory=dict)
    """Those that several items share, by node."""

    def covers(self, item: WorkItem) -> bool:
        """Whether nothing else is needed for an item."""
        if item.action == "copy" or not item.elements:
            return True
        supposed = self._supposed_statistics(item)
        return supposed is not None and self.trace(item, supposed) is not None

    def routine(self, item: WorkItem) -> Routine[Any]:
        """Everything that makes an item that is covered."""
        if item.action == "copy":
            nbytes = item.elements * item.dtype.bits // 8
            yield [Job(partial(self._copy, item, *span)) for span in self._left(item, nbytes, _COPY_BYTES, 1)]
            return
        if chunks := list(self.left(item)):
            statistics = yield from self._statistics(item)
            yield [Job(partial(self._write_or_fall_back, item, statistics, *chunk)) for chunk in chunks]

    def shared_statistics(self, members: Sequence[Member]) -> Routine[Any]:
        """Those over several items, which their routines find here."""
        statistics = yield from self._swept(members, {})
        self.statistics.update((id(node), statistics) for _, node in members)

    def _statistics(self, item: WorkItem) -> Generator[Sequence[Job[Any]], list[Any], dict[int, Any]]:
        """Those of the methods of an item that is covered, by node."""
        found: dict[int, Any] = {}
        for node in _with_statistics(item):
            if id(node) in self.statistics:
                found[id(node)] = self.statistics[id(node)]
            else:
                found[id(node)] = yield from self._swept([(item, node)], found)
        return found

    def _swept(
        self, members: Sequence[Member], known: Mapping[int, Any]
    ) -> Generator[Sequence[Job[Any]], list[Any], Any]:
        """What a method's sweeps over all members come to."""
        generator = statistics_generator(members[0][1], sum(item.elements for item, _ in members))
        total = None
        try:
            while True:
                sweep, sums = generator.send(total), Totals()
                yield [
                    Job(partial(self._sweep_or_fall_back, item, node, sweep, known, number, sums, *chunk))
                    for number, (item, node) in enumerate(members)
                    for chunk in cut(item.elements, _SWEPT)
                ]
                total = sums.array()
        except StopIteration as finished:
            return finished.value

    def _supposed_statistics(self, item: WorkItem) -> dict[int, Any] | None:
        """Statistics as they might be; None where a method asks for a sweep that torch has to do."""
        supposed: dict[int, Any] = {}
        for node in _with_statistics(item):
            generator, total = statistics_generator(node, item.elements), None
            try:
                while True:
                    sweep = generator.send(total)
                    if self._swept_trace(item, node, sweep, supposed) is None:
                        return None
                    is_search = isinstance(sweep, RankSweep)
                    total = sweep.search.supposed(item.elements) if is_search else np.eye(len(node.sources))
            except StopIteration as finished:
                supposed[id(node)] = finished.value
        return supposed

    def left(self, item: WorkItem) -> Iterator[tuple[int, int]]:
        """The chunks of an item, in elements, that are still to be written; the others are told as progress."""
        return self._left(item, item.elements, self._length, item.dtype.bits // 8)

    @property
    def _length(self) -> int:
        """Elements of a chunk."""
        return max(self.chunk // BLOCK, 1) * BLOCK

    def _left(self, item: WorkItem, size: int, length: int, width: int) -> Iterator[tuple[int, int]]:
        for start, stop in cut(size, length):
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
            execution, lane = self.by_torch(statistics)
            execution.write_chunk(item, start, stop, lane)

    def _sweep_or_fall_back(
        self,
        item: WorkItem,
        node: Apply,
        sweep: Sweep,
        statistics: Mapping[int, Any],
        number: int,
        sums: Totals,
        start: int,
        stop: int,
        lane: Any,
    ) -> None:
        if not self.sweep(item, node, sweep, start, stop, statistics, number, sums):
            execution, lane = self.by_torch(statistics)
            for begin, end in cut(stop - start, self._length):
                execution.sweep_chunk(item, node, sweep, start + begin, start + end, number, sums, lane)

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

    def sweep(
        self,
        item: WorkItem,
        node: Apply,
        sweep: Sweep,
        start: int,
        stop: int,
        statistics: Mapping[int, Any],
        number: int,
        sums: Totals,
    ) -> bool:
        """Add what a sweep finds on elements [start, stop) of an item; False, and nothing is, where torch has to."""
        trace = self._swept_trace(item, node, sweep, statistics)
        if trace is None or start % native.LANES:
            return False
        if isinstance(sweep, RankSweep):
            found: Mapping[int, Any] | None = self._counts(item, trace, sweep.search, start, stop)
        else:
            found = self._products(item, trace, start, stop)
        for begin, value in (found or {}).items():
            sums.add((number, begin), value)
        return found is not None

    def _swept_trace(self, item: WorkItem, node: Apply, sweep: Sweep, statistics: Mapping[int, Any]) -> Trace | None:
        """The program of what is counted or multiplied; None where torch is to do it."""
        if item.wide or not isinstance(sweep, RankSweep | DotProducts) or not self._takes(item):
            return None
        if sweep.search.dtype == "float64" if isinstance(sweep, RankSweep) else len(node.sources) > _MOST_SUMMED:
            return None
        kind = ("sweep", item.applied.index(node), sweep.values)
        trace = self._recorded(kind, item, statistics, lambda block: sweep.values(block.operands(node)))
        return None if trace is None or trace.streams else trace

    def _products(
        self, item: WorkItem, trace: Trace, start: int, stop: int
    ) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]] | None:
        """The Gram matrices of blocks, by their first elements."""
        kernel = native.compiled(trace.program, native.Summing(trace.results))
        pieces = Pieces(self, start, stop)
        run = self.runner(item, trace, kernel, pieces)
        if run is None:
            return None
        count = len(trace.results)
        sums = np.empty((count * (count + 1) // 2, ROW))
        found = {}
        for block in range(start, stop, BLOCK):
            sums[:] = 0
            for begin in range(block, min(block + BLOCK, stop), _PIECE):
                elements = min(_PIECE, stop - begin)
                pieces.read(begin, elements, repeat=False)
                if run(begin, elements, sums.ctypes.data)[0] >= kernel.limit:
                    return None
            found[block] = gram_of_rows(sums, count)
        return found

    def _counts(
        self, item: WorkItem, trace: Trace, search: RankSearch, start: int, stop: int
    ) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]] | None:
        """What a sweep of a search for ranks counts."""
        shift, size = search.digits()
        targets = list(dict.fromkeys((target.source, target.prefix >> shift) for target in search.targets))
        counting = native.Counting(tuple(trace.results[source] for source, _ in targets), shift, size)
        kernel = native.compiled(trace.program, counting)
        pieces = Pieces(self, start, stop)
        run = self.runner(item, trace, kernel, pieces, [prefix for _, prefix in targets])
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
        found = [rows[target.source, target.prefix >> shift] for target in search.targets]
        return {start: np.concatenate([*found, [stop - start, 0]]).astype(np.int64)}

    def trace(self, item: WorkItem, statistics: Mapping[int, Any] | None) -> Trace | None:
        """How the item's value is made; None where it cannot be told, or not so."""
        if statistics is None or not self._takes(item):
            return None
        return self._recorded(item.dtype.name, item, statistics, value_of(item))

    def _recorded(
        self, kind: Hashable, item: WorkItem, statistics: Mapping[int, Any], evaluate: Callable[[Block], Any]
    ) -> Trace | None:
        """The program of what is evaluated; the same one for items that are treated alike."""
        try:
            key = (signature(item.node, item, statistics, {}), kind, item.wide)
            if key not in self._traces:
                self._traces[key] = recorded(item, statistics, evaluate)
            return self._traces[key]
        except TypeError:  # parameters that cannot be compared
            return recorded(item, statistics, evaluate)

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
            reader = self._items.readers[read.input]
            take: Callable[[int, memoryview], None] = partial(reader.read_into, read.tensor)
            if isinstance(reader, FileReader) and reader.direct:
                most = min(self._stop - self._start, DEFAULT_CHUNK)
                take = Ahead(take, self._stop * width, self._items.buffers.bytes(f"{role} ahead", most * width).data)
            self._stored[leaf] = take, width, self._items.buffers.bytes(role, _PIECE * width)
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

    def read(self, begin: int, count: int, *, repeat: bool = True) -> None:
        """Read ``count`` elements of each from ``begin`` on; copies of the last one, or zeros, fill its vector."""
        spare = -count % native.LANES
        for read, width, buffer in self._stored.values():
            stop = count * width
            read(begin * width, buffer[:stop].data)
            if spare:
                buffer[stop : stop + spare * width] = np.tile(buffer[stop - width : stop], spare) if repeat else 0
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
        return isinstance(leaf.encoding, Scaled) and stored_type(leaf) in native.CODES
    return isinstance(leaf, Drawn) or (isinstance(leaf, Read) and stored_type(leaf) in native.LOADED)


def _limit(item: WorkItem, infinity: int) -> int:
    """The bits of the largest magnitude that the storage type of the result holds."""
    largest = item.dtype.max_finite or math.inf
    if item.wide:
        return min(infinity - 1, int(np.float64(largest).view(np.uint64)))
    with np.errstate(over="ignore"):
        return min(infinity - 1, int(np.float32(largest).view(np.uint32)))


def cut(size: int, length: int) -> Iterator[tuple[int, int]]:
    """Where each piece of that length begins and ends; the last one may be shorter."""
    return ((start, min(start + length, size)) for start in range(0, size, length))


def _with_statistics(item: WorkItem) -> list[Apply]:
    return [node for node in item.applied if node.method.statistics is not None]
