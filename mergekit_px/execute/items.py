"""The routines of work items: statistics first, then the value, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.errors import NonFiniteError
from mergekit_px.execute.encoded import Ranges, Span, encoded, spans
from mergekit_px.execute.fused import FusedItems, Sink, cut
from mergekit_px.execute.lane import Lane
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.sweeps import Totals, driven, replayed, statistics_generator
from mergekit_px.execute.values import Block, WholeTensor, check_finite
from mergekit_px.execute.views import RowMeans, ViewValues
from mergekit_px.methods.declare import Sweep
from mergekit_px.plan.budget import BLOCK, needs_whole, ranged, row_length, unit, whole_bytes
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Adapted, Apply, Leaf, Node, Read, View
from mergekit_px.stages import timed

_FLOAT32_RANGE = 3e38


@dataclass
class Execution:
    """What the routines of one run share."""

    readers: Mapping[str, TensorReader]
    labels: Mapping[str, str]
    sink: Sink
    chunk: int
    seed: int
    allow_nonfinite: bool
    advance: Callable[[str, int], None]
    """Told of (tensor, bytes written or found written)."""
    fused: FusedItems
    """Makes what needs no torch."""
    statistics: dict[int, Any] = field(default_factory=dict)
    """Node -> what its method's statistics generator returned."""
    largest: dict[str, torch.Tensor] = field(default_factory=dict)
    """Encoded item -> its largest magnitudes for each scale, where they were found before it is written."""
    means: RowMeans = field(default_factory=RowMeans)

    def routine(self, item: WorkItem) -> Routine[Lane]:
        """Everything that makes one output tensor."""
        if item.action == "copy":
            yield from self.fused.routine(item)
        elif needs_whole(item):
            if not self.skip(item, 0, item.elements):
                yield [self._job(self._write_whole, item, memory=whole_bytes(item))]
        elif item.encoding is not None and ranged(item):
            yield from self._ranged(item)
        elif item.elements <= self._length(item):
            if item.elements and not self.skip(item, 0, item.elements):
                yield [self._job(self._write_small, item)]
        else:
            chunks = [(start, stop) for start, stop in self.chunks(item) if not self.skip(item, start, stop)]
            if chunks:
                for node in self._unknown(item):
                    self.statistics[id(node)] = yield from self._swept(node, [(item, node)])
                yield [self._job(self._write_chunk, item, start, stop) for start, stop in chunks]
        for node in item.applied:
            self.statistics.pop(id(node), None)

    def _job(self, work: Callable[..., None], *arguments: Any, memory: int = 0) -> Job[Lane]:
        """A job of a worker; what finds no room on its device is done on the CPU."""

        def run(lane: Lane) -> None:
            try:
                work(*arguments, lane)
            except torch.OutOfMemoryError:
                if lane.device.type == "cpu":
                    raise
                lane.release()
                torch.cuda.empty_cache()
                work(*arguments, Lane(torch.device("cpu")))

        return Job(run, memory)

    def shared_statistics(self, members: Sequence[tuple[WorkItem, Apply]]) -> Routine[Lane]:
        """Statistics over all tensors of the model that one step treats alike."""
        for item, node in members:
            yield from self._inner_statistics(item, node)
        self._keep(members, (yield from self._swept(members[0][1], members)))

    def known_statistics(self, members: Sequence[tuple[WorkItem, Apply]], totals: Sequence[torch.Tensor]) -> None:
        """The same, where the totals of all sweeps are known."""
        self._keep(members, replayed(members[0][1], _elements(members), totals)[1])

    def partial_sums(
        self,
        members: Sequence[tuple[WorkItem, Apply]],
        share: Sequence[int],
        totals: Sequence[torch.Tensor],
        sums: Totals,
    ) -> Routine[Lane]:
        """What some of the members, by their numbers, add to the sweep after those whose totals are known."""
        sweep, _ = replayed(members[0][1], _elements(members), totals)
        assert sweep is not None
        for number in share:
            yield from self._inner_statistics(*members[number])
        yield [job for number in share for job in self._sweep_jobs(number, members[number], sweep, sums)]

    def _keep(self, members: Sequence[tuple[WorkItem, Apply]], statistics: Any) -> None:
        self.statistics.update((id(node), statistics) for _, node in members)

    def _inner_statistics(self, item: WorkItem, node: Apply) -> Generator[Sequence[Job[Lane]], list[Any], None]:
        """Of the methods of an item that another needs the values of."""
        for inner in self._unknown(item):
            if item.applied.index(inner) < item.applied.index(node):
                self.statistics[id(inner)] = yield from self._swept(inner, [(item, inner)])

    def _unknown(self, item: WorkItem) -> list[Apply]:
        """The methods of an item that have statistics and do not know them yet, inner ones first."""
        return [node for node in item.applied if node.method.statistics is not None and id(node) not in self.statistics]

    def _swept(
        self, node: Apply, members: Sequence[tuple[WorkItem, Apply]]
    ) -> Generator[Sequence[Job[Lane]], list[Any], Any]:
        """Sweep all chunks of all members as often as the method asks; returns its statistics."""
        generator = statistics_generator(node, _elements(members))
        total = None
        try:
            while True:
                sweep = next(generator) if total is None else generator.send(total)
                sums = Totals()
                yield [
                    job
                    for number, member in enumerate(members)
                    for job in self._sweep_jobs(number, member, sweep, sums)
                ]
                total = sums.total()
        except StopIteration as finished:
            return finished.value

    def _sweep_jobs(
        self, number: int, member: tuple[WorkItem, Apply], sweep: Sweep, sums: Totals
    ) -> Iterator[Job[Lane]]:
        item, node = member
        for start, stop in self.chunks(item):
            yield self._job(self.sweep_chunk, item, node, sweep, start, stop, number, sums)

    def _length(self, item: WorkItem) -> int:
        """Elements of an item's chunks."""
        piece = unit(item)
        return max(self.chunk // piece, 1) * piece

    def chunks(self, item: WorkItem) -> Iterator[tuple[int, int]]:
        """Where an item is cut, in elements."""
        return cut(item.elements, self._length(item))

    def skip(self, item: WorkItem, start: int, stop: int) -> bool:
        """Whether the elements [start, stop) are written already, which is told as progress then."""
        spans = self._spans(item, start, stop)
        if not all(self.sink.done(span.name, span.start, span.stop) for span in spans):
            return False
        self.advance(item.name, sum(span.nbytes for span in spans))
        return True

    def _fused(self, item: WorkItem, start: int, stop: int, lane: Lane) -> bool:
        return (
            item.encoding is None and lane.device.type == "cpu" and self.fused.write(item, start, stop, self.statistics)
        )

    def _spans(self, item: WorkItem, start: int, stop: int) -> list[Span]:
        """Where the elements [start, stop) of an item are written; of one whose scales are known, its codes alone."""
        found = spans(item, start, stop)
        return found[:1] if item.name in self.largest else found

    def _ranged(self, item: WorkItem) -> Routine[Lane]:
        """An encoded item whose scales are over many rows: its largest magnitudes first, then as others."""
        everything = spans(item, 0, item.elements)
        if all(self.sink.done(span.name, span.start, span.stop) for span in everything):
            self.advance(item.name, item.nbytes)
            return
        for node in self._unknown(item):
            self.statistics[id(node)] = yield from self._swept(node, [(item, node)])
        ranges = Ranges(item)
        yield [self._job(self._range_chunk, item, start, stop, ranges) for start, stop in self.chunks(item)]
        self.largest[item.name] = ranges.largest
        name, scales = everything[1].name, ranges.scales()
        self.sink.write(name, 0, as_bytes(scales))
        self.advance(item.name, scales.numel())
        chunks = [(start, stop) for start, stop in self.chunks(item) if not self.skip(item, start, stop)]
        yield [self._job(self._write_chunk, item, start, stop) for start, stop in chunks]
        del self.largest[item.name]

    def _range_chunk(self, item: WorkItem, start: int, stop: int, ranges: Ranges, lane: Lane) -> None:
        with lane.computing():
            raw = self.read(item, item.leaves, start, stop, lane)
            piece = unit(item)
            for begin in range(start, stop, piece):
                ranges.add(begin, self.block(item, raw, start, begin, min(begin + piece, stop)).value(item.node))
        lane.finish()

    def _write_chunk(self, item: WorkItem, start: int, stop: int, lane: Lane) -> None:
        if not self._fused(item, start, stop, lane):
            self.write_chunk(item, start, stop, lane)

    def write_chunk(self, item: WorkItem, start: int, stop: int, lane: Lane) -> None:
        """Elements [start, stop), by torch."""
        with lane.computing():
            self._write(item, self.read(item, item.leaves, start, stop, lane), start, stop, lane)

    def _write_small(self, item: WorkItem, lane: Lane) -> None:
        """An item of one chunk: swept in memory, and written."""
        unknown = self._unknown(item)
        if not unknown and self._fused(item, 0, item.elements, lane):
            return
        with lane.computing():
            raw = self.read(item, item.leaves, 0, item.elements, lane)
            for node in unknown:

                def total(sweep: Sweep, node: Apply = node) -> torch.Tensor:
                    sums = Totals()
                    self._sweep(item, node, sweep, raw, 0, item.elements, 0, sums)
                    return sums.total()

                self.statistics[id(node)] = driven(node, item.elements, total)
            if not (unknown and self._fused(item, 0, item.elements, lane)):
                self._write(item, raw, 0, item.elements, lane)

    def _write(self, item: WorkItem, raw: Mapping[int, Any], start: int, stop: int, lane: Lane) -> None:
        found = self._spans(item, start, stop)
        hosts = [lane.host_bytes(f"output {number}", span.nbytes) for number, span in enumerate(found)]
        outs = hosts if lane.device.type == "cpu" else [torch.empty_like(host, device=lane.device) for host in hosts]
        piece = unit(item) if lane.device.type == "cpu" else stop - start
        for begin in range(start, stop, piece):
            end = min(begin + piece, stop)
            with timed("arithmetic"):
                value = self.block(item, raw, start, begin, end).value(item.node)
            if item.encoding is None:
                out = outs[0].view(item.dtype.torch)
                self.store(item, value, out[begin - start : end - start])
                continue
            parts = encoded(item, value, begin, self.largest.get(item.name))
            for out, span, part, into in zip(outs, found, parts, self._spans(item, begin, end), strict=False):
                out[into.start - span.start : into.stop - span.start] = part
        if outs is not hosts:
            for host, out in zip(hosts, outs, strict=True):
                host.copy_(out, non_blocking=True)
        lane.finish()
        self.put(item, found, hosts)

    def put(self, item: WorkItem, found: Sequence[Span], hosts: Sequence[torch.Tensor]) -> None:
        """Write what is stored of a range of an item."""
        for span, host in zip(found, hosts, strict=True):
            self.sink.write(span.name, span.start, as_bytes(host))
            self.advance(item.name, span.nbytes)

    def _write_whole(self, item: WorkItem, lane: Lane) -> None:
        lane.release()
        with lane.computing():
            block = WholeTensor(
                item.name,
                0,
                partial(self._load_whole, item, lane),
                partial(self._read_factors, lane=lane),
                self.statistics,
                self.seed,
                item.shape,
                item.elements,
            )
            for node in self._unknown(item):
                self.statistics[id(node)] = _whole_statistics(item, node, block)
            with timed("arithmetic"):
                value = block.value(item.node)
            if item.encoding is None:
                stored = torch.empty(item.elements, dtype=item.dtype.torch, device=value.device)
                self.store(item, value, stored)
                hosts = [stored.view(torch.uint8).cpu()]
            else:
                hosts = [part.cpu() for part in encoded(item, value, 0, None)]
        lane.release()
        self.put(item, spans(item, 0, item.elements), hosts)

    def sweep_chunk(
        self,
        item: WorkItem,
        node: Apply,
        sweep: Sweep,
        start: int,
        stop: int,
        number: int,
        sums: Totals,
        lane: Lane,
    ) -> None:
        """What a sweep finds on elements [start, stop) of an item, which is that ``number`` of all its items."""
        if lane.device.type == "cpu" and self.fused.sweep(
            item, node, sweep, start, stop, self.statistics, number, sums
        ):
            return
        with lane.computing():
            leaves = [leaf for leaf in item.leaves if _uses(node, leaf)]
            self._sweep(item, node, sweep, self.read(item, leaves, start, stop, lane), start, stop, number, sums)
        lane.finish()

    def _sweep(
        self,
        item: WorkItem,
        node: Apply,
        sweep: Sweep,
        raw: Mapping[int, Any],
        start: int,
        stop: int,
        number: int,
        sums: Totals,
    ) -> None:
        piece = unit(item)
        for begin in range(start, stop, piece):
            block = self.block(item, raw, start, begin, min(begin + piece, stop))
            with timed("arithmetic"):
                sums.add((number, begin), sweep(block.operands(node)))

    def read(self, item: WorkItem, leaves: Sequence[Leaf], start: int, stop: int, lane: Lane) -> dict[int, Any]:
        """The elements [start, stop) of some stored tensors and views, and all of the adapters' tensors, by node."""
        raw: dict[int, Any] = {}
        for number, read in enumerate(leaves):
            if not isinstance(read, Read):
                raw[id(read)] = self._view_values(item, read, lane)(start, stop).to(lane.device)
                continue
            width = read.dtype.bits // 8
            host = lane.host_bytes(f"read {number}", (stop - start) * width)
            self.readers[read.input].read_into(read.tensor, start * width, as_bytes(host))
            raw[id(read)] = lane.to_device(host).view(read.dtype.torch)
        for node in item.adapted:
            raw[id(node)] = self._read_factors(node, lane)
        return raw

    def block(
        self,
        item: WorkItem,
        raw: Mapping[int, Any],
        origin: int,
        begin: int,
        end: int,
        known: dict[int, torch.Tensor] | None = None,
    ) -> Block:
        """The elements [begin, end) of an item; ``raw`` begins at ``origin``."""
        dtype = accumulation_dtype(item)
        row = row_length(item) if any(node.access == "rows" for node in item.applied) else None

        def load(read: Leaf) -> torch.Tensor:
            with timed("decode"):
                value: torch.Tensor = raw[id(read)][begin - origin : end - origin].to(dtype)
            if not self.allow_nonfinite:
                check_finite(value, self._label(read), "the source")
            return value if row is None else value.view(-1, row)

        factors = partial(self._factors, raw)
        return Block(item.name, begin, load, factors, self.statistics, self.seed, item.shape, end, known)

    def _factors(self, raw: Mapping[int, Any], node: Adapted) -> Mapping[str, torch.Tensor]:
        factors: Mapping[str, torch.Tensor] = raw[id(node)]
        return factors

    def _read_factors(self, node: Adapted, lane: Lane) -> dict[str, torch.Tensor]:
        """An adapter's tensors for one target, on the device, as stored."""
        found: dict[str, torch.Tensor] = {}
        for role, stored in (node.patch.factors if node.patch is not None else {}).items():
            label = f"{node.input}#{node.number}"
            value = read_tensor(self.readers[label], stored).to(lane.device)
            if not self.allow_nonfinite and value.is_floating_point():
                check_finite(value.float(), f"{self.labels[label]}: {stored.name}", "the adapter")
            found[role] = value
        return found

    def _view_values(self, item: WorkItem, view: View, lane: Lane) -> Callable[[int, int], torch.Tensor]:
        """Gives the elements of a view."""
        factors = partial(self._read_factors, lane=lane)
        return ViewValues(self.readers, factors, self.seed, accumulation_dtype(item), self.means).values(view)

    def _label(self, leaf: Node) -> str:
        """The checkpoint and tensor of a leaf; of a view the first that it is made of."""
        while not isinstance(leaf, Read):
            if not leaf.operands:
                return "random numbers"
            leaf = leaf.operands[0]
        return f"{self.labels[leaf.input]}: {leaf.tensor.name}"

    def _load_whole(self, item: WorkItem, lane: Lane, read: Leaf) -> torch.Tensor:
        if not isinstance(read, Read):
            value = self._view_values(item, read, lane)(0, math.prod(read.shape)).to(lane.device)
            if not self.allow_nonfinite:
                check_finite(value, self._label(read), "the source")
            return value.view(read.shape)
        width = read.dtype.bits // 8
        nbytes = math.prod(read.shape) * width
        # Where nothing is copied to a device, the bytes as stored are not kept until the next tensor.
        host = torch.empty(nbytes, dtype=torch.uint8) if lane.device.type == "cpu" else lane.host_bytes("whole", nbytes)
        self.readers[read.input].read_into(read.tensor, 0, as_bytes(host))
        with timed("decode"):
            value = lane.to_device(host).view(read.dtype.torch).to(accumulation_dtype(item), copy=True)
        lane.finish()
        if not self.allow_nonfinite:
            check_finite(value, self._label(read), "the source")
        return value.view(read.shape)

    def store(self, item: WorkItem, value: torch.Tensor, stored: torch.Tensor) -> None:
        """Round once into the storage dtype; what does not fit there is an error."""
        if not self.allow_nonfinite and value.numel():
            limit = item.dtype.max_finite or math.inf
            if limit >= _FLOAT32_RANGE:
                check_finite(value, item.name, "the merged value")
            elif not _is_within(value, limit):
                bounds = value.aminmax()
                raise NonFiniteError(
                    f"the merged value (from {float(bounds.min):g} to {float(bounds.max):g}) "
                    f"does not fit {item.dtype.name}",
                    where=item.name,
                    hint="lower the weights, choose a wider --dtype, or pass --allow-nonfinite",
                )
        with timed("round"):
            stored.copy_(value.reshape(-1))


def _is_within(value: torch.Tensor, limit: float) -> bool:
    with timed("check"):
        bounds = value.aminmax()
        return float(bounds.min) >= -limit and float(bounds.max) <= limit


def _elements(members: Sequence[tuple[WorkItem, Apply]]) -> int:
    return sum(item.elements for item, _ in members)


def accumulation_dtype(item: WorkItem) -> torch.dtype:
    """float64 where an input is float64 or a method asks for it, else float32."""
    return torch.float64 if item.wide else torch.float32


def as_bytes(buffer: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    view: memoryview = buffer.numpy().data
    return view


def _uses(node: Node, leaf: Leaf) -> bool:
    return any(operand is leaf or _uses(operand, leaf) for operand in node.operands)


def _whole_statistics(item: WorkItem, node: Apply, block: WholeTensor) -> Any:
    """Statistics inside an expression that is evaluated whole, over the same blocks as elsewhere."""
    operands = block.operands(node)
    row = row_length(item) if node.access == "rows" else 1
    shape = (-1, row) if node.access == "rows" else (-1,)
    tensors = [tensor.reshape(shape) for tensor in operands.tensors]
    base = None if operands.base is None else operands.base.reshape(shape)
    step = max(1, BLOCK // row)

    def total(sweep: Sweep) -> torch.Tensor:
        sums = Totals()
        for begin in range(0, item.elements // row, step):
            part = slice(begin, begin + step)
            pieces = [tensor[part] for tensor in tensors]
            based = None if base is None else base[part]
            sums.add((0, begin), sweep(replace(operands, tensors=pieces, base=based)))
        return sums.total()

    return driven(node, item.elements, total)
