"""What goes on beside a run: the sha256 of each output file, and the way of its bytes to the disk.

Both follow the writer. At the end of a run nearly everything is hashed and on the disk already, so publishing
is short; and dirty pages never pile up.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import partial

from mergekit_px.checkpoint.file_pool import FilePool
from mergekit_px.checkpoint.held import Held, in_order
from mergekit_px.checkpoint.positional import PositionalFile
from mergekit_px.stages import timed

_PIECE = 8 << 20
_IN_CACHE = 1 << 18  # of a piece, what stays in the cache between reading and hashing
_FAR_BEHIND = 32 << 20
"""Written bytes that wait for the hash: with more, who writes them lends a hand, so that little is left at the end."""
_FLUSH_EVERY = 128 << 20
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
        held: what was written and is not in the page cache, by the position of the file.
    """

    def __init__(
        self,
        pool: FilePool[PositionalFile],
        names: Sequence[str],
        sizes: Sequence[int],
        finished: Callable[[int], int],
        held: Held,
    ) -> None:
        self._pool = pool
        self._names = names
        self._sizes = sizes
        self._finished = finished
        self._digests = [hashlib.sha256() for _ in names]
        self._hashed = [0] * len(names)
        self._first = 0
        self._buffer = memoryview(bytearray(_IN_CACHE))
        self._held = held
        self._step = threading.Lock()
        for number in range(len(names)):
            held.follow(number)
        super().__init__("pxmerge-hasher")

    def step(self) -> bool:
        with self._step:
            return self._next_piece()

    def catch_up(self, written: int) -> None:
        """Hash a piece here and now if the thread is far behind the bytes that were written."""
        if written - sum(self._hashed) > _FAR_BEHIND:
            self.step()

    def _next_piece(self) -> bool:
        while self._first < len(self._names) and self._hashed[self._first] == self._sizes[self._first]:
            self._first += 1
        for number in range(self._first, len(self._names)):
            ready = self._finished(number)
            # Whole pieces only, until the file is complete: many small updates cost more than they gain.
            enough = 1 if self._held.is_due(number, self._hashed[number]) else _PIECE
            if ready - self._hashed[number] >= enough or ready == self._sizes[number] > self._hashed[number]:
                self._update(number, min(ready, self._hashed[number] + _PIECE))
                return True
        return False

    def _update(self, number: int, stop: int) -> None:
        with self._pool.use(self._names[number]) as file:
            taken = partial(self._held.take, number)
            for piece in in_order(file.read_into, self._hashed[number], stop, self._buffer, taken):
                with timed("hash"):
                    self._digests[number].update(piece)
                self._hashed[number] += len(piece)
        if self._hashed[number] < stop:
            raise OSError(f"{self._names[number]} became shorter while it was written")

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
