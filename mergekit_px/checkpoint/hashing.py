"""sha256 of files."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mergekit_px.checkpoint.contents import FileIdentity
from mergekit_px.checkpoint.held import Taken, in_order
from mergekit_px.checkpoint.ranged import address_of, changed, open_ranged
from mergekit_px.checkpoint.remembered import Remembered
from mergekit_px.errors import InputError, InputNotFoundError
from mergekit_px.stages import timed

_PIECE = 1 << 18  # stays in the cache between reading and hashing
_WORTH_REMEMBERING = 1 << 20
"""Bytes of a file from which on looking its hash up takes less time than computing it."""

_SETTLED = 2.0
"""Seconds after which a write gets another time than the one before it, on every file system in use."""


class HashingStopped(Exception):
    """The one who asked for a hash does not want it any more."""


def file_sha256(
    path: Path,
    *,
    remember: bool = True,
    expected: FileIdentity | None = None,
    stopped: Callable[[int], bool] = lambda hashed: False,
    taken: Taken | None = None,
) -> str:
    """Hex sha256 of the bytes of a file.

    Args:
        remember: take the hash that was computed when the file had the same place, size, times and inode.
        expected: which file it must be.
        stopped: asked between pieces, of how many bytes are hashed; may wait until it is time for more.
        taken: gives what was kept of the file; the rest is then read past the page cache.

    Raises ``InputNotFoundError``; ``InputError`` for a file that cannot be read or changes meanwhile;
    ``HashingStopped``.
    """
    store = Remembered("sha256")
    try:
        with closing(open_ranged(path, direct=taken is not None)) as file:
            identity = file.identity()
            if expected is not None and identity != expected:
                raise changed(path)
            key = f"{address_of(path.resolve())}:{':'.join(map(str, identity))}"
            large = identity.size >= _WORTH_REMEMBERING
            known = store.get(key) if remember and large else None
            if isinstance(known, str):
                return known
            began = time.time_ns()
            digest, done = file.hashed()
            buffer = memoryview(bytearray(min(_PIECE, identity.size)))
            for piece in in_order(file.read_into, done, identity.size, buffer, taken):
                with timed("hash"):
                    digest.update(piece)
                done += len(piece)
                if stopped(done):
                    raise HashingStopped
            if file.identity() != identity:
                raise changed(path)
    except FileNotFoundError:
        raise InputNotFoundError("no such file", where=address_of(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if large and began - max(identity.mtime_ns, identity.ctime_ns) > _SETTLED * 1e9:
        store.put({key: digest.hexdigest()})
    return digest.hexdigest()
