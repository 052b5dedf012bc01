"""Files read and written at given offsets by several threads.

``pread`` and ``pwrite`` where the system has them. Elsewhere (Windows), or when asked for, one handle with a
lock: seek, then read or write.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mergekit_px.checkpoint.contents import FileIdentity
from mergekit_px.checkpoint.direct import WORTHWHILE, DirectAccess
from mergekit_px.small_files import open_regular

if TYPE_CHECKING:
    from hashlib import _Hash

PORTABLE_VARIABLE = "PXMERGE_PORTABLE_IO"

_LARGEST_CALL = 1 << 30  # Linux moves at most 2 GiB less a page in one call
_BINARY = getattr(os, "O_BINARY", 0)
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def is_portable(asked: bool = False) -> bool:
    """Whether the portable fallback is to be used: asked for, forced by ``PXMERGE_PORTABLE_IO=1``, or needed."""
    return asked or os.environ.get(PORTABLE_VARIABLE) == "1" or not hasattr(os, "preadv")


class PositionalFile(Protocol):
    """An open file. All methods but ``close`` may be called by several threads; ``OSError`` passes through."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` on; return the bytes read, fewer only at the end of the file."""

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer`` at ``offset``."""

    @property
    def descriptor(self) -> int | None:
        """The system's number of it, if ``pread`` of any place is how to read it."""

    def identity(self) -> FileIdentity:
        """Which file it is, by what the system records."""

    def hashed(self) -> tuple[_Hash, int]:
        """The sha256 of no bytes: reading computes none here."""

    def allocate(self, size: int) -> None:
        """Give the file ``size`` bytes, of real space where the file system can reserve it."""

    def sync(self) -> None:
        """Wait until what was written is on the disk."""

    def close(self) -> None:
        """Close the file; a second call does nothing."""


def open_positional(
    path: Path,
    *,
    writable: bool = False,
    create: bool = False,
    portable: bool = False,
    direct: bool = False,
    where: str | None = None,
) -> PositionalFile:
    """Open ``path``; with ``create`` it is made if it is missing, with the permissions of the umask.

    Args:
        direct: go past the page cache where the file system is known to do that well.

    Raises ``OSError``; ``MalformedCheckpointError`` that names ``where``, for reading what is no regular file.
    """
    if writable or create:
        descriptor = os.open(path, os.O_RDWR | _BINARY | (os.O_CREAT if create else 0), 0o666)
    else:
        descriptor = open_regular(path, where or str(path))
    if is_portable(portable):
        return _SeekingFile(descriptor, writable or create)
    return _PreadFile(descriptor, DirectAccess.to(descriptor, writable=writable or create) if direct else None)


class _PreadFile:
    def __init__(self, descriptor: int, direct: DirectAccess | None = None) -> None:
        self._descriptor = descriptor
        self._direct = direct

    @property
    def descriptor(self) -> int | None:
        return self._descriptor if self._direct is None else None

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        if self._direct is not None and len(buffer) >= WORTHWHILE:
            done = self._direct.read_into(offset, buffer)
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done : done + _LARGEST_CALL]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def write(self, offset: int, buffer: memoryview) -> None:
        if self._direct is not None:
            start, stop = self._direct.write(offset, buffer)
            self._write(offset, buffer[:start])
            offset, buffer = offset + stop, buffer[stop:]
        self._write(offset, buffer)

    def _write(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._descriptor, buffer[done : done + _LARGEST_CALL], offset + done)

    def identity(self) -> FileIdentity:
        return FileIdentity.of(os.fstat(self._descriptor))

    def hashed(self) -> tuple[_Hash, int]:
        return hashlib.sha256(), 0

    def allocate(self, size: int) -> None:
        allocate(self._descriptor, size)

    def sync(self) -> None:
        sync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        if self._direct is not None:
            self._direct.close()

    def __del__(self) -> None:
        self.close()


class _SeekingFile:
    def __init__(self, descriptor: int, writable: bool) -> None:
        self._file = os.fdopen(descriptor, "r+b" if writable else "rb", buffering=0)
        self._lock = threading.Lock()
        self.descriptor = None

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(buffer):
                count = self._file.readinto(buffer[done : done + _LARGEST_CALL])
                if not count:
                    break
                done += count
        return done

    def write(self, offset: int, buffer: memoryview) -> None:
        done = 0
        with self._lock:
            self._file.seek(offset)
            while done < len(buffer):
                done += self._file.write(buffer[done : done + _LARGEST_CALL]) or 0

    def identity(self) -> FileIdentity:
        return FileIdentity.of(os.fstat(self._file.fileno()))

    def hashed(self) -> tuple[_Hash, int]:
        return hashlib.sha256(), 0

    def allocate(self, size: int) -> None:
        with self._lock:
            self._file.truncate(size)

    def sync(self) -> None:
        sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def allocate(descriptor: int, size: int) -> None:
    """Set the size of a file and reserve the space, so that a full disk shows before the work, not after.

    Where the file system cannot reserve (``posix_fallocate`` missing or refused), the file is only sized.
    Measured on ext4: reserving costs nothing and lets the later writes go faster, since no block has to be
    found for them.
    """
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def sync(descriptor: int) -> None:
    """``fdatasync``, or ``fsync`` where there is none."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames in a folder last, where the system allows folders to be synced. Raises ``OSError``."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
