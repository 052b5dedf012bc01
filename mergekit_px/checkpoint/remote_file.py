"""A file of weights in a store, read by ranges: small reads apart go as they are, streams as large blocks, ahead.

The sha256 is computed from the blocks on their way, as far as they come in order; what is left of it is read at the
end. So a file that is merged from its first byte to its last crosses the network once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.contents import FileIdentity
from mergekit_px.checkpoint.object_store import ObjectStore, StoredObject

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 16 << 20
"""Bytes of one request: the first byte of each takes tens of milliseconds from a store, and its preparation some of
this machine. Of 4, 8, 16 and 32 MiB this read most in a second from a server on the same machine."""
KEPT_BLOCKS = 5
"""Of one model: those that workers are reading, and the one that comes next."""
_AHEAD = 1
_STREAM = 256 << 10
"""Bytes in a row from which on more is expected to be read; headers and samples are less."""
_RUNS = 16

_requests = ThreadPoolExecutor(max_workers=16, thread_name_prefix="pxmerge-store")


class Blocks:
    """The blocks of one model's files that were read last, or are being read."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: RemoteFile, number: int) -> bytes:
        """A block, once it is there; those after it are asked for. Raises ``InputError``."""
        last = (file.size - 1) // BLOCK
        with self._lock:
            wanted = self._ask(file, number)
            for ahead in range(number + 1, min(number + _AHEAD, last) + 1):
                self._ask(file, ahead)
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        try:
            return wanted.result()
        except BaseException:
            with self._lock:
                self._blocks.pop((file.name, number), None)
            raise

    def _ask(self, file: RemoteFile, number: int) -> Future[bytes]:
        key = (file.name, number)
        if key not in self._blocks:
            self._blocks[key] = _requests.submit(self._fetch, file, number)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _fetch(self, file: RemoteFile, number: int) -> bytes:
        start = number * BLOCK
        data = self._store.read(file.name, start, min(start + BLOCK, file.size))
        file.arrived(number, data)
        return data


class RemoteFile:
    """One file of weights in a store; safe to share between threads, and kept as long as its model is in use."""

    def __init__(self, store: ObjectStore, name: str, listed: StoredObject, blocks: Blocks) -> None:
        self.name = name
        self.size = listed.size
        self._store = store
        self._blocks = blocks
        self._lock = threading.Lock()
        self._runs: deque[tuple[int, int]] = deque(maxlen=_RUNS)
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._waiting: dict[int, bytes] = {}
        self.descriptor = None

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """As of a local file. Raises ``InputError``."""
        stop = min(offset + len(buffer), self.size)
        if offset >= stop:
            return 0
        if not self._is_stream(offset, stop):
            buffer[: stop - offset] = self._store.read(self.name, offset, stop)
            return stop - offset
        for number in range(offset // BLOCK, (stop - 1) // BLOCK + 1):
            begin = number * BLOCK
            first, last = max(offset, begin), min(stop, begin + BLOCK)
            block = self._blocks.get(self, number)
            buffer[first - offset : last - offset] = memoryview(block)[first - begin : last - begin]
        return stop - offset

    def identity(self) -> FileIdentity:
        """What the store says of it now."""
        return identity_of_object(self._store.status(self.name))

    def hashed(self) -> tuple[_Hash, int]:
        """The sha256 of its first bytes, and how many they are."""
        with self._lock:
            return self._digest.copy(), self._hashed

    def close(self) -> None:
        """Nothing is held open."""

    def arrived(self, number: int, data: bytes) -> None:
        """Take a block into the hash, if it is the next."""
        with self._lock:
            if number * BLOCK < self._hashed or len(self._waiting) >= KEPT_BLOCKS:
                return
            self._waiting[number] = data
            while (following := self._waiting.pop(self._hashed // BLOCK, None)) is not None:
                self._digest.update(following)
                self._hashed += len(following)
                if self._hashed == self.size:
                    return

    def _is_stream(self, offset: int, stop: int) -> bool:
        """Whether a read is a large one, or goes on where others ended that were large together."""
        with self._lock:
            run = next((run for run in self._runs if run[0] == offset), None)
            if run is not None:
                self._runs.remove(run)
            length = stop - offset + (0 if run is None else run[1])
            self._runs.append((stop, length))
            return length >= _STREAM


def identity_of_object(status: StoredObject) -> FileIdentity:
    """What stands for times and inode where there are none."""
    return FileIdentity(status.size, 0, 0, 0, 0, status.etag)
