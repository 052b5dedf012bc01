"""Boxes of an array put together: any grid, any range, against numpy."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest

from mergekit_px.checkpoint.pieces import Piece, check_pieces, read_pieces
from mergekit_px.errors import MalformedCheckpointError


def cut(shape: tuple[int, ...], draw: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A grid of boxes: start and shape of each."""
    edges = []
    for length in shape:
        inner = draw.sample(range(1, length), draw.randint(0, min(3, length - 1))) if length > 1 else []
        edges.append(sorted({0, *inner, length}))
    axes = [list(itertools.pairwise(edge)) for edge in edges]
    return [
        (tuple(first for first, _ in box), tuple(last - first for first, last in box))
        for box in itertools.product(*axes)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_any_grid_and_any_range(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 4)))
    whole = numpy.arange(numpy.prod(shape, dtype=int), dtype=numpy.uint16).reshape(shape) * 7 + 3
    stored: dict[str, bytes] = {}
    pieces = []
    for number, (start, counts) in enumerate(cut(shape, draw)):
        box = whole[tuple(slice(first, first + count) for first, count in zip(start, counts, strict=True))]
        stored[str(number)] = b"xyz" + numpy.ascontiguousarray(box).tobytes()
        pieces.append(Piece(start, counts, str(number), 3))
    draw.shuffle(pieces)
    check_pieces(pieces, shape, "here")

    def read(file: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = stored[file][offset : offset + buffer.nbytes]

    expected = whole.tobytes()
    for _ in range(20):
        start, stop = sorted(2 * draw.randint(0, whole.size) for _ in range(2))
        buffer = bytearray(stop - start)
        read_pieces(pieces, shape, 2, start, memoryview(buffer), read)
        assert bytes(buffer) == expected[start:stop]


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4))],
        [((0, 0), (4, 4)), ((0, 0), (1, 1))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],
        [((0, 0), (4, 3)), ((1, 2), (4, 1))],
        [((0, 0), (5, 4))],
        [((0,), (4,))],
        [],
    ],
)
def test_pieces_with_holes_or_overlaps_are_refused(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    with pytest.raises(MalformedCheckpointError, match="piece"):
        check_pieces([Piece(start, shape, "file", 0) for start, shape in boxes], (4, 4), "here")


def test_two_hundred_thousand_pieces_are_checked_in_a_moment() -> None:
    pieces = [Piece((row, 0), (1, 4), "file", 0) for row in range(200_000)]
    check_pieces(pieces, (200_000, 4), "here")
