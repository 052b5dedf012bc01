"""Output tensors that are made element by element, in one pass over their bytes and without torch.

What a work item's expression does is recorded once (:mod:`mergekit_px.kernels.tracing`), compiled
(:mod:`mergekit_px.kernels.native`), and run over pieces that fit the cache: read, compute, and on to the output. Where
anything is not of this kind, or a value is not finite, the item goes the way of all others, which also words the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.execute.pieces import Buffers, Computation, Pieces
from mergekit_px.execute.recording import Trace, recorded, signature, stored_type, value_of
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.sweeps import Totals, statistics_generator
from mergekit_px.execute.values import Block
from mergekit_px.kernels import native
from mergekit_px.kernels.random import stream_key
from mergekit_px.kernels.reduction import ROW, gram_of_rows
from mergekit_px.kernels.selection import RankSearch
from mergekit_px.methods.declare import Sweep
from mergekit_px.methods.pruning import RankSweep
from mergekit_px.methods.sphere import DotProducts
from mergekit_px.plan.budget import BLOCK, needs_whole
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Drawn, Leaf, Read
from mergekit_px.storage.scaled import Scaled

_COPY_BYTES = 8 << 20

Member = tuple[WorkItem, Apply]

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


@dataclass
class FusedItems:
    """The items of a run that can be made so, and how. Arguments are those of ``Execution``."""

    readers: Mapping[str, TensorReader]
    sink: Sink
    chunk: int
    workers: int
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

    def pieces(self, start: int, stop: int) -> Pieces:
        """Of what items read, from their element ``start`` to ``stop``."""
        return Pieces(self.readers, self.buffers, self.seed, start, stop, self.workers)

    def computation(
        self,
        item: WorkItem,
        trace: Trace,
        kernel: native.Kernel,
        pieces: Pieces,
        output: np.ndarray[Any, Any],
        *,
        width: int = 0,
        largest: int | None = None,
        prefixes: Sequence[int] = (),
    ) -> Computation | None:
        """A program of an item with its arguments; ``largest``: the bits of the largest result that can be stored. None
        where torch is to decode an input."""
        inputs: list[int] = []
        for place in trace.leaves:
            addresses = pieces.of(item.leaves[place])
            if addresses is None:
                return None
            inputs += addresses
        streams = [stream_key(self.seed, f"{step}/{item.name}", source) for step, source in trace.streams]
        finite = kernel.limit - 1
        return Computation(
            kernel=kernel,
            numbers=np.array(trace.program.numbers or [0.0]),
            keys=np.array([*streams, *prefixes] or [0], dtype=np.int64),
            inputs=np.array(inputs, dtype=np.int64),
            output=output,
            width=width,
            maxima=np.zeros(2, dtype=np.uint32 if trace.program.type == "float" else np.uint64),
            limits=(finite, finite if largest is None else largest),
        )

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
        count = len(trace.results)
        sums = np.empty((count * (count + 1) // 2, ROW))
        found = {}
        with self.pieces(start, stop) as pieces:
            computation = self.computation(item, trace, kernel, pieces, sums)
            if computation is None:
                return None
            for begin, end in cut(stop - start, BLOCK):
                sums[:] = 0
                if not pieces.compute([computation], start + begin, start + end, repeat=False):
                    return None
                found[start + begin] = gram_of_rows(sums, count)
        return found

    def _counts(
        self, item: WorkItem, trace: Trace, search: RankSearch, start: int, stop: int
    ) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]] | None:
        """What a sweep of a search for ranks counts."""
        shift, size = search.digits()
        targets = list(dict.fromkeys((target.source, target.prefix >> shift) for target in search.targets))
        counting = native.Counting(tuple(trace.results[source] for source, _ in targets), shift, size)
        kernel = native.compiled(trace.program, counting)
        counts, last = np.zeros((2, len(targets), size + 1), dtype=np.int32)
        prefixes = [prefix for _, prefix in targets]
        with self.pieces(start, stop) as pieces:
            computation = self.computation(item, trace, kernel, pieces, counts, prefixes=prefixes)
            if computation is None or not pieces.compute([computation], start, stop):
                return None
            if spare := (start - stop) % native.LANES:
                # The last element was repeated to fill its vector; a vector of it alone tells where it counts.
                pieces.compute([replace(computation, output=last)], stop - 1, stop)
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


def write_together(members: Sequence[tuple[FusedItems, WorkItem, Mapping[int, Any]]], start: int, stop: int) -> bool:
    """Write elements [start, stop) of items of several outputs, whose leaves are the same objects where they are the
    same tensors: what they share is read once. False, and nothing is written, where one is not for this class."""
    first = members[0][0]
    made: list[Computation] = []
    with first.pieces(start, stop) as pieces:
        for number, (fused, item, statistics) in enumerate(members):
            trace = fused.trace(item, statistics)
            if trace is None or start % native.LANES:
                return False
            kernel = native.compiled(trace.program, item.dtype.name)
            width = item.dtype.bits // 8
            out = first.buffers.bytes(f"output {number}", (stop - start) * width)
            largest = _limit(item, kernel.limit)
            computation = fused.computation(item, trace, kernel, pieces, out, width=width, largest=largest)
            if computation is None:
                return False
            made.append(computation)
        if not pieces.compute(made, start, stop):
            return False
    for (fused, item, _), computation in zip(members, made, strict=True):
        nbytes = (stop - start) * computation.width
        fused.sink.write(item.name, start * computation.width, computation.output[:nbytes].data)
        fused.advance(item.name, nbytes)
    return True


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
