"""What goes on beside a run: the sha256 of each output file, and the way of its bytes to the disk.

Both follow the writer. At the end of a run nearly everything is hashed and on the disk already, so publishing
is short; and dirty pages never pile up.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

from mergekit_px.checkpoint.file_pool import FilePool
from mergekit_px.checkpoint.positional import PositionalFile
from mergekit_px.stages import timed

_PIECE = 8 << 20
_IN_CACHE = 1 << 18  # of a piece, what stays in the cache between reading and hashing
_FLUSH_EVERY = 128 << 20
HELD = 32 << 20
"""Bytes that may wait in memory for their turn to be hashed, of files that are not in the page cache."""
_PATIENCE = 1.0
"""Seconds that a writer waits for room for them. What is not kept is read again, from the disk."""
_PAUSE = 0.02  # seconds between looks at the writer's progress


class _Follower:
    """A thread that calls ``step`` again and again; it sleeps a little after a step without work."""

    def __init__(self, name: str) -> None:
        self.error: OSError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; a second call does nothing."""
        self._stopping.set()
        self._thread.join()

    def step(self) -> bool:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self.step():
                    self._stopping.wait(_PAUSE)
        except OSError as error:
            self.error = error


class Hasher(_Follower):
    """sha256 of files that are being written, over the finished beginning of each.

    Args:
        pool: gives the files.
        names: of the files.
        sizes: in bytes.
        finished: position of a file -> how many of its first bytes are final.
    """

    def __init__(
        self, pool: FilePool[PositionalFile], names: Sequence[str], sizes: Sequence[int], finished: Callable[[int], int]
    ) -> None:
        self._pool = pool
        self._names = names
        self._sizes = sizes
        self._finished = finished
        self._digests = [hashlib.sha256() for _ in names]
        self._hashed = [0] * len(names)
        self._first = 0
        self._buffer = memoryview(bytearray(_IN_CACHE))
        self._held: dict[tuple[int, int], bytes] = {}
        self._room = HELD
        self._state = threading.Condition()
        super().__init__("pxmerge-hasher")

    def hold(self, number: int, place: int, data: memoryview) -> None:
        """Keep bytes that are about to be written until they are hashed, so that they need not be read again; where
        there is no room for them, wait a little for some."""
        with self._state:
            if not self._state.wait_for(lambda: len(data) <= self._room, _PATIENCE):
                return
            self._room -= len(data)
        kept = bytes(data)
        with self._state:
            self._held[number, place] = kept

    def _take(self, number: int, place: int) -> tuple[bytes | None, int]:
        """What was kept from there on, if it was, and where the next that was kept begins."""
        with self._state:
            kept = self._held.pop((number, place), None)
            if kept is not None:
                self._room += len(kept)
                self._state.notify_all()
            return kept, min((start for file, start in self._held if file == number and start > place), default=place)

    def step(self) -> bool:
        while self._first < len(self._names) and self._hashed[self._first] == self._sizes[self._first]:
            self._first += 1
        for number in range(self._first, len(self._names)):
            ready = self._finished(number)
            # Whole pieces only, until the file is complete: many small updates cost more than they gain.
            enough = 1 if self._held else _PIECE
            if ready - self._hashed[number] >= enough or ready == self._sizes[number] > self._hashed[number]:
                self._update(number, min(ready, self._hashed[number] + _PIECE))
                return True
        return False

    def _update(self, number: int, stop: int) -> None:
        with self._pool.use(self._names[number]) as file:
            place = self._hashed[number]
            while place < stop:
                kept, after = self._take(number, place)
                piece = memoryview(kept or b"")
                if kept is None:
                    piece = self._buffer[: min(stop, after if after > place else stop) - place]
                    with timed("read"):
                        if file.read_into(place, piece) != len(piece):
                            raise OSError(f"{self._names[number]} became shorter while it was written")
                with timed("hash"):
                    self._digests[number].update(piece)
                place += len(piece)
        self._hashed[number] = place

    def result(self) -> list[str]:
        """Hex sha256 per file, once all files are complete: hashes what is left. Raises ``OSError``."""
        self.stop()
        if self.error is not None:
            raise self.error
        while self.step():
            pass
        return [digest.hexdigest() for digest in self._digests]


class Flusher(_Follower):
    """Sends written bytes to the disk every so often, so that the sync at the end finds little to do.

    Args:
        sync: waits until all bytes written so far are on the disk.
        written: how many bytes have been written so far.
    """

    def __init__(self, sync: Callable[[], None], written: Callable[[], int]) -> None:
        self._sync = sync
        self._written = written
        self._flushed = 0
        super().__init__("pxmerge-flusher")

    def step(self) -> bool:
        written = self._written()
        if written - self._flushed < _FLUSH_EVERY:
            return False
        self._sync()
        self._flushed = written
        return True
