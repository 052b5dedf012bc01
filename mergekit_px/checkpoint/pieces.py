"""Tensors that are stored in pieces: boxes of one array, each in row-major order at a place of its own."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mergekit_px.errors import MalformedCheckpointError

Read = Callable[[str, int, memoryview], None]
"""Fills a buffer from a file, beginning at an offset."""


class Piece(NamedTuple):
    """A box of a tensor: its first element, its shape, and where its bytes are."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def check_pieces(pieces: Sequence[Piece], shape: tuple[int, ...], where: str) -> None:
    """Refuse pieces that leave a part of the tensor out, or overlap. Raises ``MalformedCheckpointError``."""
    for piece in pieces:
        if len(piece.start) != len(shape) or len(piece.shape) != len(shape):
            raise MalformedCheckpointError(
                f"a piece of {len(piece.shape)} axes of a tensor of {len(shape)}", where=where
            )
        if any(begin < 0 or count < 0 or begin + count > whole
               for begin, count, whole in zip(piece.start, piece.shape, shape, strict=True)):  # fmt: skip
            raise MalformedCheckpointError(
                f"a piece at {list(piece.start)} of {list(piece.shape)} lies outside the tensor of {list(shape)}",
                where=where,
            )
    held = sum(piece.elements for piece in pieces)
    if held != math.prod(shape) or _overlap([piece for piece in pieces if piece.elements]):
        raise MalformedCheckpointError(
            f"its {len(pieces)} pieces do not make up the tensor of {list(shape)}: they hold {held:,} of"
            f" {math.prod(shape):,} elements, or overlap",
            where=where,
            hint="copy the checkpoint again",
        )


def read_pieces(
    pieces: Sequence[Piece], shape: tuple[int, ...], width: int, start: int, buffer: memoryview, read: Read
) -> None:
    """Bytes ``[start, start + len(buffer))`` of the whole tensor in row-major order; ``width``: bytes of an element."""
    import numpy
    from numpy.lib.stride_tricks import as_strided

    stop = start + buffer.nbytes
    for piece in pieces:
        for first, source, nbytes, count, step in _spans(piece, shape, width, start, stop):
            if count == 1:
                read(piece.file, source, buffer[first - start : first - start + nbytes])
                continue
            # Rows of a box lie side by side where they are stored, and apart in the tensor.
            held = numpy.empty((count, nbytes), dtype=numpy.uint8)
            read(piece.file, source, held.reshape(-1).data)
            place = first - start
            rows = numpy.frombuffer(buffer, dtype=numpy.uint8)[place : place + (count - 1) * step + nbytes]
            as_strided(rows, shape=(count, nbytes), strides=(step, 1))[:] = held


def _spans(
    piece: Piece, shape: tuple[int, ...], width: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Where a piece meets a range: (byte in the tensor, byte in the file, bytes of a run, runs, bytes between runs).

    A run is what is contiguous in both. All whole runs along the last outer axis are one span.
    """
    if not piece.elements:
        return
    outer = _outer_axes(piece, shape)
    run = math.prod(piece.shape[outer:]) * width
    strides = [math.prod(shape[axis + 1 :]) * width for axis in range(len(shape))]
    inner = sum(begin * stride for begin, stride in zip(piece.start[outer:], strides[outer:], strict=True))
    counts = piece.shape[:outer]

    def place(number: int) -> int:
        """Of a run in the tensor, in bytes."""
        total = inner
        for axis in reversed(range(outer)):
            number, index = divmod(number, counts[axis])
            total += (piece.start[axis] + index) * strides[axis]
        return total

    runs = math.prod(counts)
    number = max(0, bisect.bisect_right(range(runs), start, key=place) - 1)
    row = counts[-1] if counts else 1
    while number < runs:
        first = place(number)
        if first >= stop:
            return
        begin, end = max(first, start), min(first + run, stop)
        if begin >= end:
            number += 1
            continue
        source = piece.offset + number * run
        if begin > first or end < first + run or outer == 0:
            yield begin, source + begin - first, end - begin, 1, 0
            number += 1
            continue
        step = strides[outer - 1]
        most = (stop - first - run) // step + 1
        count = min(row - number % row, most)
        yield first, source, run, count, step
        number += count


def _outer_axes(piece: Piece, shape: tuple[int, ...]) -> int:
    """How many leading axes are walked over: behind them, and along the next axis, the piece is contiguous."""
    axis = len(shape)
    while axis > 0 and piece.shape[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(0, axis - 1)


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether two boxes share an element; looked for among those that are near along the first axis."""
    if not pieces or not pieces[0].shape:
        return len(pieces) > 1
    ordered = sorted(pieces, key=lambda piece: piece.start)
    active: list[Piece] = []
    for piece in ordered:
        active = [other for other in active if other.start[0] + other.shape[0] > piece.start[0]]
        for other in active:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(piece.start, piece.shape, other.start, other.shape, strict=True)
            ):
                return True
        active.append(piece)
    return False
