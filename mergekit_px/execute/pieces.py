"""Elementwise computing over stored tensors: piece by piece, each read once for all that is computed on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any

import numpy as np

from mergekit_px import stages
from mergekit_px.checkpoint.file_pool import files_at_once
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.checkpoint.reader import Ahead, FileReader, TensorReader
from mergekit_px.kernels import native
from mergekit_px.kernels.native_loop import (
    FILLED,
    PIECE,
    SCALES,
    SOURCE,
    TASK,
    native_loop,
    system_function,
)
from mergekit_px.kernels.random import drawn
from mergekit_px.plan.budget import DEFAULT_CHUNK
from mergekit_px.plan.nodes import Decoded, Drawn, Leaf, Read
from mergekit_px.stages import timed
from mergekit_px.storage.scaled import Floats, Scaled

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_ALIGNMENT = 64
_DRAWN_BYTES = 4
"""Of a random number before it is rounded."""
_SPARE = native.LANES * 8
"""Room behind the elements of a buffer for the rest of a vector."""


class Buffers(local):
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


@dataclass(frozen=True)
class Computation:
    """A program with its arguments.

    Attributes:
        inputs: the buffers of its pieces.
        output: where its results begin; ``width``: bytes of each, 0 where all elements add to the same.
        limits: what the largest magnitudes of inputs and results, as bits, may be.
    """

    kernel: native.Kernel
    numbers: np.ndarray[Any, Any]
    keys: np.ndarray[Any, np.dtype[np.int64]]
    inputs: np.ndarray[Any, np.dtype[np.int64]]
    output: np.ndarray[Any, Any]
    width: int
    maxima: np.ndarray[Any, Any]
    limits: tuple[int, int]

    def task(self) -> tuple[int, ...]:
        arrays = (self.output, self.numbers, self.keys, self.maxima, self.inputs)
        output, *others = (array.ctypes.data for array in arrays)
        return (self.kernel.address, output, self.width, *others)

    @property
    def is_finite(self) -> bool:
        """Whether all that was read is, and all results can be stored."""
        return int(self.maxima[0]) <= self.limits[0] and int(self.maxima[1]) <= self.limits[1]


@dataclass(frozen=True)
class _Source:
    """How a buffer is filled: from a file, where it is one that the machine may read, or by a call."""

    width: int
    buffer: Bytes
    read: Callable[[int, memoryview], None] | None = None
    file: tuple[int, int] = (FILLED, 0)
    count: Callable[[int], None] = lambda nbytes: None
    """Told of bytes that were read from the file."""

    def row(self, *, by_machine: bool) -> tuple[int, int, int, int]:
        file, place = self.file if by_machine or self.file[0] == SCALES else (FILLED, 0)
        return (file, place, self.width, self.buffer.ctypes.data)


class Pieces(ExitStack):
    """Pieces of stored tensors, for elements [start, stop) of each. A context: files stay open in it.

    Args:
        readers: of the inputs.
        workers: how many read so at once.
    """

    def __init__(
        self,
        readers: Mapping[str, TensorReader],
        buffers: Buffers,
        seed: int,
        start: int,
        stop: int,
        workers: int,
    ) -> None:
        super().__init__()
        self._readers = readers
        self._buffers = buffers
        self._seed = seed
        self._start = start
        self._stop = stop
        self._most_files = files_at_once() // workers
        self._sources: dict[Leaf, list[_Source]] = {}

    def of(self, leaf: Leaf) -> list[int] | None:
        """Addresses of its pieces: of elements as stored, and of one scale for each vector of what is decoded. None
        where torch is to decode it."""
        if leaf not in self._sources:
            role = f"read {len(self._sources)}"
            if isinstance(leaf, Drawn):
                buffer = self._buffers.bytes(role, PIECE * _DRAWN_BYTES)
                self._sources[leaf] = [_Source(_DRAWN_BYTES, buffer, partial(_draw, leaf, self._seed))]
            else:
                read = leaf.parts[0] if isinstance(leaf, Decoded) else leaf
                assert isinstance(read, Read)
                sources = [self._stored(read, role)]
                if isinstance(leaf, Decoded):
                    scales = self._scales(leaf, f"{role} scales")
                    if scales is None:
                        return None
                    sources.append(scales)
                self._sources[leaf] = sources
        return [source.buffer.ctypes.data for source in self._sources[leaf]]

    def _stored(self, read: Read, role: str) -> _Source:
        width = read.dtype.bits // 8
        buffer = self._buffers.bytes(role, PIECE * width)
        reader = self._readers[read.input]
        take: Callable[[int, memoryview], None] = partial(reader.read_into, read.tensor)
        if not isinstance(reader, FileReader):
            return _Source(width, buffer, take)
        if reader.direct:
            most = min(self._stop - self._start, DEFAULT_CHUNK)
            take = Ahead(take, self._stop * width, self._buffers.bytes(f"{role} ahead", most * width).data)
        if len(self._sources) >= self._most_files or not system_function("pread"):
            return _Source(width, buffer, take)
        place = self.enter_context(reader.located(read.tensor))
        return _Source(width, buffer, take, place or (FILLED, 0), partial(reader.count, read.tensor.file))

    def _scales(self, leaf: Decoded, role: str) -> _Source | None:
        reader = self._readers[leaf.parts[0].input]

        def read(tensor: StoredTensor, begin: int, end: int) -> Bytes:
            width = tensor.dtype.bits // 8
            buffer = np.empty((end - begin) * width, dtype=np.uint8)
            reader.read_into(tensor, begin * width, buffer.data)
            return buffer

        assert isinstance(leaf.encoding, Scaled)
        scales: Floats | None = leaf.encoding.vector_scales(read, self._start, self._stop, native.LANES)
        if scales is None:
            return None
        buffer = self._buffers.bytes(role, PIECE // native.LANES * scales.itemsize)
        self.callback(lambda: scales)  # kept as long as its address is in use
        return _Source(scales.itemsize, buffer, file=(SCALES, scales.ctypes.data))

    def compute(self, computations: Sequence[Computation], begin: int, stop: int, *, repeat: bool = True) -> bool:
        """Compute on elements [begin, stop); False where a number is not finite, or a result cannot be stored.

        Args:
            repeat: whether copies of the last element fill its vector, or zeros.

        Raises what readers raise.
        """
        sources = [source for several in self._sources.values() for source in several]
        tasks = np.array([computation.task() for computation in computations], dtype=TASK)
        spent = np.zeros(2, dtype=np.int64)
        clock = system_function("clock_gettime") if stages.is_measuring() else 0

        def run(begin: int, stop: int, *, by_machine: bool) -> int:
            table = np.array([source.row(by_machine=by_machine) for source in sources], dtype=SOURCE)
            arguments = (table.ctypes.data, len(table), tasks.ctypes.data, len(tasks), self._start, begin, stop, repeat)
            with timed("arithmetic"):
                reached = native_loop()(*arguments, system_function("pread"), clock, spent.ctypes.data)
                stages.count("read", *spent.tolist())
                spent[:] = 0
            for source in sources:
                if by_machine and source.file[0] >= 0:
                    source.count((reached - begin) * source.width)
            return reached

        by_machine = all(source.file != (FILLED, 0) for source in sources)
        while begin < stop:
            if by_machine:
                begin = run(begin, stop, by_machine=True)
            if begin < stop:  # what cannot be read so is read by its reader, which words the error too
                end = min(begin + PIECE, stop)
                for source in sources:
                    if source.read is not None:
                        nbytes = (end - begin) * source.width
                        source.read(begin * source.width, source.buffer[:nbytes].data)
                begin = run(begin, end, by_machine=False)
            if not all(computation.is_finite for computation in computations):
                return False
        return True


def _draw(leaf: Drawn, seed: int, start: int, buffer: memoryview) -> None:
    """Random numbers as if they were stored."""
    numbers = np.frombuffer(buffer, dtype=np.float32)
    first = start // _DRAWN_BYTES
    np.multiply(drawn(seed, leaf.stream, first, numbers.size, leaf.distribution), np.float32(leaf.scale), out=numbers)
