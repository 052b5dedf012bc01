"""The routines of work items: statistics first, then the value, chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.errors import NonFiniteError
from mergekit_px.execute.lane import Lane
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.execute.values import Block, WholeTensor, check_finite
from mergekit_px.methods.declare import Extent, Sweep
from mergekit_px.plan.budget import BLOCK, row_length, unit
from mergekit_px.plan.model import Apply, Read, WorkItem

_COPY_BYTES = 8 << 20


class Sink(Protocol):
    """Where output bytes go."""

    def done(self, name: str, start: int, stop: int) -> bool: ...

    def write(self, name: str, start: int, buffer: memoryview) -> None: ...


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
    statistics: dict[int, Any] = field(default_factory=dict)
    """Node -> what its method's statistics generator returned."""

    def routine(self, item: WorkItem) -> Routine[Lane]:
        """Everything that makes one output tensor."""
        if item.action == "copy":
            yield self._copy_jobs(item)
        elif item.access == "tensor":
            if not self._skip(item, 0, item.elements):
                yield [Job(partial(self._write_whole, item), wide=True)]
        else:
            chunks = [(start, stop) for start, stop in self._chunks(item) if not self._skip(item, start, stop)]
            if chunks:
                yield from self._statistics(item, [node for node in item.applied if id(node) not in self.statistics])
                yield [Job(partial(self._write_chunk, item, start, stop)) for start, stop in chunks]
        for node in item.applied:
            self.statistics.pop(id(node), None)

    def shared_statistics(self, members: Sequence[tuple[WorkItem, Apply]]) -> Routine[Lane]:
        """Statistics over all tensors of the model that one step treats alike."""
        for item, node in members:
            inner = [other for other in item.applied if other is not node and id(other) not in self.statistics]
            yield from self._statistics(item, inner[: _place(item, node, inner)])
        first = members[0][1]
        elements = sum(item.elements for item, _ in members)
        generator = _generator(first, elements)
        total = None
        try:
            while True:
                sweep = next(generator) if total is None else generator.send(total)
                sums = _Totals()
                yield [
                    Job(partial(self._sweep_chunk, item, node, sweep, start, stop, (number, start), sums))
                    for number, (item, node) in enumerate(members)
                    for start, stop in self._chunks(item)
                ]
                total = sums.total()
        except StopIteration as stop_iteration:
            for _, node in members:
                self.statistics[id(node)] = stop_iteration.value

    def _statistics(self, item: WorkItem, nodes: Sequence[Apply]) -> Routine[Lane]:
        for node in nodes:
            if node.method.statistics is None:
                continue
            generator = _generator(node, item.elements)
            total = None
            try:
                while True:
                    sweep = next(generator) if total is None else generator.send(total)
                    sums = _Totals()
                    yield [
                        Job(partial(self._sweep_chunk, item, node, sweep, start, stop, (0, start), sums))
                        for start, stop in self._chunks(item)
                    ]
                    total = sums.total()
            except StopIteration as stop_iteration:
                self.statistics[id(node)] = stop_iteration.value

    def _chunks(self, item: WorkItem) -> Iterator[tuple[int, int]]:
        piece = unit(item)
        length = max(self.chunk // piece, 1) * piece
        for start in range(0, item.elements, length):
            yield start, min(start + length, item.elements)

    def _skip(self, item: WorkItem, start: int, stop: int) -> bool:
        width = item.dtype.bits // 8
        if not self.sink.done(item.name, start * width, stop * width):
            return False
        self.advance(item.name, (stop - start) * width)
        return True

    def _copy_jobs(self, item: WorkItem) -> list[Job[Lane]]:
        read = item.reads[0]
        nbytes = item.elements * item.dtype.bits // 8
        jobs: list[Job[Lane]] = []
        for start in range(0, nbytes, _COPY_BYTES):
            stop = min(start + _COPY_BYTES, nbytes)
            if self.sink.done(item.name, start, stop):
                self.advance(item.name, stop - start)
            else:
                jobs.append(Job(partial(self._copy, item, read, start, stop)))
        return jobs

    def _copy(self, item: WorkItem, read: Read, start: int, stop: int, lane: Lane) -> None:
        buffer = as_bytes(lane.host_bytes("copy", stop - start))
        self.readers[read.input].read_into(read.tensor, start, buffer)
        self.sink.write(item.name, start, buffer)
        self.advance(item.name, stop - start)

    def _write_chunk(self, item: WorkItem, start: int, stop: int, lane: Lane) -> None:
        with lane.computing():
            raw = self._read(item, start, stop, lane)
            width = item.dtype.bits // 8
            host = lane.host_bytes("output", (stop - start) * width)
            out = host if lane.device.type == "cpu" else torch.empty_like(host, device=lane.device)
            stored = out.view(item.dtype.torch)
            piece = unit(item) if lane.device.type == "cpu" else stop - start
            for begin in range(start, stop, piece):
                end = min(begin + piece, stop)
                value = self._block(item, raw, start, begin, end).value(item.node)
                self._store(item, value, stored[begin - start : end - start])
            if out is not host:
                host.copy_(out, non_blocking=True)
        lane.finish()
        self.sink.write(item.name, start * width, as_bytes(host))
        self.advance(item.name, (stop - start) * width)

    def _write_whole(self, item: WorkItem, lane: Lane) -> None:
        with lane.computing(), lane.wide():
            block = WholeTensor(
                item.name, 0, partial(self._load_whole, item, lane), self.statistics, self.seed, item.shape
            )
            for node in item.applied:
                if node.method.statistics is not None and id(node) not in self.statistics:
                    self.statistics[id(node)] = _whole_statistics(item, node, block)
            value = block.value(item.node)
            stored = torch.empty(item.elements, dtype=item.dtype.torch, device=value.device)
            self._store(item, value, stored)
            host = stored.view(torch.uint8).cpu()
        lane.release()
        self.sink.write(item.name, 0, as_bytes(host))
        self.advance(item.name, host.numel())

    def _sweep_chunk(
        self,
        item: WorkItem,
        node: Apply,
        sweep: Sweep,
        start: int,
        stop: int,
        order: tuple[int, int],
        sums: _Totals,
        lane: Lane,
    ) -> None:
        with lane.computing():
            raw = self._read(item, start, stop, lane, node)
            piece = unit(item)
            for begin in range(start, stop, piece):
                block = self._block(item, raw, start, begin, min(begin + piece, stop))
                sums.add((order[0], begin), sweep(block.operands(node)))
        lane.finish()

    def _read(
        self, item: WorkItem, start: int, stop: int, lane: Lane, node: Apply | None = None
    ) -> dict[int, torch.Tensor]:
        """The stored elements [start, stop) of every tensor that is needed, on the device, in storage dtype."""
        reads = item.reads if node is None else [leaf for leaf in item.reads if _uses(node, leaf)]
        raw: dict[int, torch.Tensor] = {}
        for number, read in enumerate(reads):
            width = read.dtype.bits // 8
            host = lane.host_bytes(f"read {number}", (stop - start) * width)
            self.readers[read.input].read_into(read.tensor, start * width, as_bytes(host))
            raw[id(read)] = lane.to_device(host).view(read.dtype.torch)
        return raw

    def _block(self, item: WorkItem, raw: Mapping[int, torch.Tensor], origin: int, begin: int, end: int) -> Block:
        dtype = accumulation_dtype(item)
        row = row_length(item) if item.access == "rows" else None

        def load(read: Read) -> torch.Tensor:
            value = raw[id(read)][begin - origin : end - origin].to(dtype)
            if not self.allow_nonfinite:
                check_finite(value, f"{self.labels[read.input]}: {read.tensor.name}", "the source")
            return value if row is None else value.view(-1, row)

        return Block(item.name, begin, load, self.statistics, self.seed, item.shape)

    def _load_whole(self, item: WorkItem, lane: Lane, read: Read) -> torch.Tensor:
        width = read.dtype.bits // 8
        host = lane.host_bytes("whole", item.elements * width)
        self.readers[read.input].read_into(read.tensor, 0, as_bytes(host))
        value = lane.to_device(host).view(read.dtype.torch).to(accumulation_dtype(item), copy=True)
        lane.finish()
        if not self.allow_nonfinite:
            check_finite(value, f"{self.labels[read.input]}: {read.tensor.name}", "the source")
        return value.view(item.shape)

    def _store(self, item: WorkItem, value: torch.Tensor, stored: torch.Tensor) -> None:
        """Round once into the storage dtype; what does not fit there is an error."""
        if not self.allow_nonfinite and value.numel():
            low, high = value.aminmax()
            limit = item.dtype.max_finite
            if limit is not None and not (float(low) >= -limit and float(high) <= limit):
                raise NonFiniteError(
                    f"the merged value (from {float(low):g} to {float(high):g}) does not fit {item.dtype.name}",
                    where=item.name,
                    hint="lower the weights, choose a wider --dtype, or pass --allow-nonfinite",
                )
        stored.copy_(value.reshape(-1))


class _Totals:
    """Sums of partial results in an order that does not depend on who finished first.

    Integers are added at once, since their sum is the same in any order; floats are kept by block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._integers: torch.Tensor | None = None
        self._floats: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, order: tuple[int, int], partial_sum: torch.Tensor) -> None:
        on_host = partial_sum.cpu()
        with self._lock:
            if on_host.is_floating_point():
                self._floats[order] = on_host
            elif self._integers is None:
                self._integers = on_host.clone()
            else:
                self._integers += on_host

    def total(self) -> torch.Tensor:
        if not self._floats:
            return self._integers if self._integers is not None else torch.zeros((), dtype=torch.int64)
        parts = [part for _, part in sorted(self._floats.items())]
        result = parts[0].clone()
        for part in parts[1:]:
            result += part
        return result


def accumulation_dtype(item: WorkItem) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    wide = any(read.dtype.name == "F64" for read in item.reads)
    return torch.float64 if wide else torch.float32


def as_bytes(buffer: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    view: memoryview = buffer.numpy().data
    return view


def _generator(node: Apply, elements: int) -> Any:
    assert node.method.statistics is not None
    return node.method.statistics(Extent(len(node.sources), elements, node.weights, node.params))


def _uses(node: Apply, leaf: Read) -> bool:
    return any(operand is leaf or (isinstance(operand, Apply) and _uses(operand, leaf)) for operand in node.operands)


def _place(item: WorkItem, node: Apply, others: Sequence[Apply]) -> int:
    """How many of ``others`` stand before ``node`` in the item's order."""
    limit = item.applied.index(node)
    return sum(1 for other in others if item.applied.index(other) < limit)


def _whole_statistics(item: WorkItem, node: Apply, block: WholeTensor) -> Any:
    """Statistics of a method inside an expression that is evaluated whole, over the same blocks as elsewhere."""
    operands = block.operands(node)
    tensors = [tensor.reshape(-1) for tensor in operands.tensors]
    generator = _generator(node, item.elements)
    total = None
    try:
        while True:
            sweep = next(generator) if total is None else generator.send(total)
            sums = _Totals()
            for begin in range(0, item.elements, BLOCK):
                piece = [tensor[begin : begin + BLOCK] for tensor in tensors]
                sums.add((0, begin), sweep(_replace_tensors(operands, piece)))
            total = sums.total()
    except StopIteration as stop_iteration:
        return stop_iteration.value


def _replace_tensors(operands: Any, tensors: Sequence[torch.Tensor]) -> Any:
    from dataclasses import replace

    return replace(operands, tensors=tensors)
