"""Bytes that wait in memory for their turn to be hashed: those of files that are not in the page cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator

from mergekit_px.stages import timed

ROOM = 32 << 20
"""Bytes that may wait."""
_PATIENCE = 1.0
"""Seconds that a reader or writer waits for room. What is not kept is read again, from the disk."""


class Held:
    """Pieces of files, by their places, from those who read or write them to those who hash each file in order."""

    def __init__(self) -> None:
        self._room = ROOM
        self._pieces: dict[Hashable, dict[int, bytes]] = {}
        self._reached: dict[Hashable, int] = {}
        self._stuck = False
        """Whether there is no room, and what comes next in its file is not among the pieces."""
        self._state = threading.Condition()

    def follow(self, file: Hashable) -> None:
        """Keep pieces of a file from now on."""
        with self._state:
            self._pieces[file] = {}
            self._reached[file] = 0

    def leave(self, file: Hashable) -> None:
        """Keep nothing of a file any more."""
        with self._state:
            self._reached.pop(file, None)
            for piece in self._pieces.pop(file, {}).values():
                self._give_back(piece)

    def put(self, file: Hashable, place: int, data: memoryview) -> None:
        """Keep a copy, if somebody hashes the file and has not come past it; where there is no room, wait a little."""
        with self._state:
            if place < self._reached.get(file, place + 1):
                return
            if not self._stuck:
                self._stuck = not self._state.wait_for(lambda: len(data) <= self._room, _PATIENCE)
            if len(data) > self._room:
                return
            self._room -= len(data)
        piece = bytes(data)
        with self._state:
            if place < self._reached.get(file, place + 1) or place in self._pieces[file]:
                self._give_back(piece)
            else:
                self._pieces[file][place] = piece

    def take(self, file: Hashable, place: int) -> tuple[bytes | None, int | None]:
        """What was kept from there on, if it was, and where the next piece begins, if there is one."""
        with self._state:
            pieces = self._pieces.setdefault(file, {})
            self._reached[file] = place
            for passed in [start for start in pieces if start < place]:
                self._give_back(pieces.pop(passed))
            piece = pieces.pop(place, None)
            if piece is not None:
                self._reached[file] = place + len(piece)
                self._give_back(piece)
            return piece, min(pieces, default=None)

    def is_due(self, file: Hashable, place: int) -> bool:
        """Whether hashing should go on there: the piece is here, or those that are leave no room for it."""
        with self._state:
            return self._stuck or place in self._pieces.get(file, {})

    def _give_back(self, piece: bytes) -> None:
        self._room += len(piece)
        self._stuck = False
        self._state.notify_all()


Taken = Callable[[int], tuple[bytes | None, int | None]]
"""Gives bytes of a file from a place on, if it has them, and the next place of which it has some."""


def in_order(
    read_into: Callable[[int, memoryview], int], place: int, stop: int, buffer: memoryview, taken: Taken | None
) -> Iterator[memoryview]:
    """The bytes of a file from a place on until there are ``stop`` or more: those that were kept, and between them what
    is read into ``buffer``; less where the file ends."""
    while place < stop:
        kept, after = taken(place) if taken is not None else (None, None)
        piece = memoryview(kept or b"")
        if kept is None:
            piece = buffer[: min(stop, after or stop) - place]
            with timed("read"):
                piece = piece[: read_into(place, piece)]
        if not piece:
            return
        yield piece
        place += len(piece)
