"""Folders that trials are merged into: in memory if there is room, else beside the output."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.errors import DiskSpaceError, OutputError, OutputLockedError

IN_MEMORY = Path("/dev/shm")
_PREFIX = "pxmerge-search-"
_LOCK = "lock"
_SHARE = 0.5
"""Of what is free of the file system in memory, and of the memory itself, that trials may take unasked."""

_taken: set[Path] = set()
"""Folders of searches that are not over."""


@contextmanager
def scratch_folder(given: str | None, beside: Path, nbytes: int, note: Callable[[str], None]) -> Iterator[Path]:
    """A folder for that many bytes, removed afterwards with all that is in it.

    Args:
        given: where, if that was asked for.
        beside: used where memory has no room.

    Raises:
        OutputError, DiskSpaceError: the place that was asked for cannot be used, or has no room.
    """
    if given is not None:
        place = Path(given).expanduser()
        if not place.is_dir():
            raise OutputError("no such folder", where=f"--scratch {given}", hint="make it first")
        if (free := shutil.disk_usage(place).free) < nbytes:
            what = f"trials need {nbytes:,} bytes at a time and {free:,} are free"
            raise DiskSpaceError(what, where=f"--scratch {given}", hint="name another folder, or give fewer --jobs")
    else:
        place = IN_MEMORY if _fits_in_memory(nbytes) else beside
    note(f"trials are merged in {place}{' (memory)' if place == IN_MEMORY else ''}, {nbytes:,} bytes at a time")
    _remove_abandoned(place)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    except OSError as error:
        raise OutputError(f"it cannot be used: {error.strerror or error}", where=str(place)) from error
    lock = DirectoryLock.take(folder / _LOCK, str(folder))
    _taken.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _taken.discard(folder)
        lock.release()


def remove_folders() -> None:
    """Remove the folders of all searches here, for a process that ends at once; takes no lock."""
    for folder in tuple(_taken):
        for _ in range(3):  # a merge that is not over yet may still make files there
            shutil.rmtree(folder, ignore_errors=True)


def _fits_in_memory(nbytes: int) -> bool:
    try:
        if not os.path.ismount(IN_MEMORY) or not os.access(IN_MEMORY, os.W_OK):
            return False
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return nbytes <= _SHARE * min(shutil.disk_usage(IN_MEMORY).free, available)
    except (OSError, ValueError, AttributeError):  # no such place, or a system that does not tell
        return False


def _remove_abandoned(place: Path) -> None:
    """What killed searches of this user left: nobody holds its lock."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, OutputLockedError, AttributeError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / _LOCK).exists():
                continue
            lock = DirectoryLock.take(folder / _LOCK, str(folder))
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
