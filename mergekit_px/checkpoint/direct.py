"""Files past the page cache: what is too large to stay there anyway takes less processor time on the way around it.

Measured on ext4 on a virtual disk: written through the page cache a gigabyte costs 0.6 to 2 s of processor time,
around it 0.2 s, the copy into aligned memory included; reading costs 0.7 to 1.8 s and 0.2 s.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Self

BLOCK = 4096
"""Places, lengths and memory are multiples of it: no disk in use wants more."""
PIECE = 2 << 20
"""Bytes of a call, and of the aligned memory of a thread."""
WORTHWHILE = 1 << 18
"""Bytes of a call from which on the way around the cache is taken."""
_FILE_SYSTEMS = {"ext4", "xfs"}
"""Local ones, whose direct writes were measured, or are known to behave alike; others may send each call over a
network, or not keep both ways in step."""
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
_CACHESTAT = 451
"""The number of the call on every architecture of Linux."""
_buffers = threading.local()
"""The aligned memory of each thread, one for all files."""


class DirectAccess:
    """The other way to a file that is open already. Any number of threads; ``OSError`` passes through."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def to(cls, descriptor: int, *, writable: bool) -> Self | None:
        """To an open file; None where its file system is not one for that, or where it is to be read and is in the page
        cache."""
        if not hasattr(os, "O_DIRECT") or _file_system(descriptor) not in _FILE_SYSTEMS:
            return None
        if not writable and _is_cached(descriptor):
            return None
        try:
            # The same file, whatever has its name by now.
            return cls(os.open(f"/proc/self/fd/{descriptor}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_DIRECT))
        except OSError:
            return None

    def write(self, offset: int, buffer: memoryview) -> tuple[int, int]:
        """Write the whole blocks within ``buffer``; the bytes [start, stop) of it that were written."""
        start = -offset % BLOCK
        stop = start + max(len(buffer) - start, 0) // BLOCK * BLOCK
        if stop - start < WORTHWHILE:
            return 0, 0
        aligned = _aligned()
        try:
            for place in range(start, stop, PIECE):
                size = min(PIECE, stop - place)
                aligned[:size] = buffer[place : place + size]
                done = 0
                while done < size:
                    done += os.pwrite(self._descriptor, aligned[done:size], offset + place + done)
        except OSError as error:
            if error.errno in _REFUSED:
                return 0, 0
            raise
        return start, stop

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` on; the bytes read, fewer where the file ends, 0 where it cannot be done."""
        aligned, done = _aligned(), 0
        while done < len(buffer):
            before = (offset + done) % BLOCK
            size = min(PIECE, -(-(before + len(buffer) - done) // BLOCK) * BLOCK)
            try:
                count = os.preadv(self._descriptor, [aligned[:size]], offset + done - before)
            except OSError as error:
                if error.errno in _REFUSED:
                    return 0
                raise
            count = min(count - before, len(buffer) - done)
            if count <= 0:
                break
            buffer[done : done + count] = aligned[before : before + count]
            done += count
        return done

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _aligned() -> memoryview:
    """Memory that begins at a page, as memory maps do."""
    if not hasattr(_buffers, "aligned"):
        _buffers.aligned = memoryview(mmap.mmap(-1, PIECE))
    aligned: memoryview = _buffers.aligned
    return aligned


def _is_cached(descriptor: int) -> bool:
    """Whether more than half of a file is in the page cache; no, where the system does not tell (Linux before 6.5).

    Measured: to ask for each read whether it can be had at once (``RWF_NOWAIT``) makes the system fetch it, and so
    reads all twice.
    """
    size = os.fstat(descriptor).st_size
    wanted, counted = (ctypes.c_uint64 * 2)(0, size), (ctypes.c_uint64 * 5)()
    try:
        failed = ctypes.CDLL(None).syscall(ctypes.c_long(_CACHESTAT), descriptor, wanted, counted, 0)
    except (OSError, AttributeError):
        return False
    return not failed and 2 * counted[0] * mmap.PAGESIZE > size


def _file_system(descriptor: int) -> str | None:
    """The type of the file system, by the table of mounts; None where there is none."""
    try:
        device = os.fstat(descriptor).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0]
    except (OSError, IndexError, AttributeError, ValueError):
        pass
    return None


def available_memory() -> int | None:
    """Bytes that programs and the page cache may still take; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
