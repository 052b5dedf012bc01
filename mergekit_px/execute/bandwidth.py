"""What this machine can move: memory and disk bandwidth, measured briefly and remembered."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mergekit_px.checkpoint.remembered import Remembered

_PIECE = 16 << 20
_SECONDS = 0.25
_REMEMBERED_FOR = 7 * 24 * 3600.0
_STORE = Remembered("bandwidth")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second.

    ``memory``: copying within memory with all cores, reads and writes counted once. ``read``: a file that is in the
    page cache, by all cores. ``cold``: a file that is not, by all cores, each at a place of its own; None where the
    system does not let go of it, as in a file system in memory. ``write``: a new file, synced to the disk.
    """

    memory: float
    read: float
    write: float
    cold: float | None = None

    def bound(self, bytes_read: int, bytes_written: int) -> float:
        """The least seconds for a merge: its reads and its writes go on side by side, and neither can be faster."""
        memory = (bytes_read + bytes_written) / self.memory
        return max(memory, bytes_read / self.read, bytes_written / self.write)


def measure(directory: Path, *, megabytes: int = 256) -> Bandwidth:
    """Measure on the file system of ``directory`` (which must exist) with a temporary file that is removed.

    Takes about a second. Raises OSError where the folder cannot be written.
    """
    write, read, cold = _file_bandwidth(directory, max(megabytes * 1_000_000 // _PIECE, 2))
    return Bandwidth(memory=_memory_bandwidth(), read=read, write=write, cold=cold)


def remembered(directory: Path) -> Bandwidth | None:
    """The bandwidth of that file system as measured within the last week; None if it was not."""
    entry = _STORE.get(_key(directory))
    try:
        measured = dict(entry)
        if time.time() - measured.pop("when") > _REMEMBERED_FOR:
            return None
        return Bandwidth(**measured)
    except (TypeError, KeyError, ValueError):
        return None


def remember(directory: Path, bandwidth: Bandwidth) -> None:
    """Keep a measurement for later plans and runs."""
    _STORE.put({_key(directory): {**asdict(bandwidth), "when": time.time()}})


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` (or itself) that exists."""
    place = path.expanduser().resolve()
    return next(parent for parent in (place, *place.parents) if parent.is_dir())


def _key(directory: Path) -> str:
    return str(existing_parent(directory).stat().st_dev)


def _memory_bandwidth() -> float:
    import numpy

    copied = [0] * (os.cpu_count() or 1)

    def work(place: int) -> None:
        source = numpy.ones(_PIECE * 2, dtype=numpy.uint8)
        target = numpy.empty_like(source)
        numpy.copyto(target, source)
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            numpy.copyto(target, source)
            copied[place] += 2 * source.nbytes

    return _in_threads(work, copied)


def _file_bandwidth(directory: Path, pieces: int) -> tuple[float, float, float | None]:
    piece = os.urandom(1 << 16) * (_PIECE >> 16)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".pxmerge-bandwidth-") as file:
        start = time.perf_counter()
        for _ in range(pieces):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        write = pieces * _PIECE / (time.perf_counter() - start)
        copied = [0] * (os.cpu_count() or 1)

        def work(place: int) -> None:
            buffer = bytearray(_PIECE)
            end = time.perf_counter() + _SECONDS
            with Path(file.name).open("rb", buffering=0) as own:
                while time.perf_counter() < end:
                    count = own.readinto(buffer)
                    copied[place] += count
                    if not count:
                        own.seek(0)

        read = _in_threads(work, copied)
        return write, read, _cold_bandwidth(file.fileno(), Path(file.name), pieces)


def _cold_bandwidth(descriptor: int, path: Path, pieces: int) -> float | None:
    """Each core reads its share of a file once, after the system was told to forget it; None where it did not."""
    before = _read_from_disks()
    if before is None or not hasattr(os, "posix_fadvise"):
        return None
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    copied = [0] * (os.cpu_count() or 1)

    def work(place: int) -> None:
        buffer = bytearray(_PIECE)
        with path.open("rb", buffering=0) as own:
            for piece in range(place, pieces, len(copied)):
                own.seek(piece * _PIECE)
                copied[place] += own.readinto(buffer)

    rate = _in_threads(work, copied)
    after = _read_from_disks()
    return rate if after is not None and after - before >= sum(copied) / 2 else None


def _read_from_disks() -> int | None:
    """Bytes that the system has fetched from disks for this process; None where it does not tell."""
    try:
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _in_threads(work: object, copied: list[int]) -> float:
    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(copied))]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(sum(copied), 1) / (time.perf_counter() - start)
