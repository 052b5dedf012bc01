"""Files opened when first needed and kept open, never more than a few dozen at a time, or than the system allows."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar


class _Closable(Protocol):
    def close(self) -> None: ...


File = TypeVar("File", bound=_Closable)

_OPEN_FILES = 64  # macOS allows a process 256 in all by default
_RESERVED = 48
"""Of the files that the system allows, those left to everything else: libraries, journals, modules still to load."""

_pools: weakref.WeakSet[FilePool[Any]] = weakref.WeakSet()
_lock = threading.Lock()
"""One for all pools, since one may have to close files of another."""


class FilePool(Generic[File]):
    """Hands out open files by name to any number of threads.

    ``open_file`` is called when a name is asked for that is not open; what it raises passes through. Beyond
    the limit of a pool, and of the process over all pools, files that nobody is using are closed, the one idle the
    longest first.
    """

    def __init__(self, open_file: Callable[[str], File]) -> None:
        self._open_file = open_file
        self._files: OrderedDict[str, File] = OrderedDict()
        self._users: dict[str, int] = {}
        self._most_of_all = files_at_once()
        with _lock:
            _pools.add(self)

    @contextmanager
    def use(self, name: str) -> Iterator[File]:
        """The open file ``name``, which stays open at least as long as the context."""
        with _lock:
            if name not in self._files:
                self._make_room()
                self._files[name] = self._open_file(name)
                self._users[name] = 0
            self._files.move_to_end(name)
            self._users[name] += 1
            file = self._files[name]
        try:
            yield file
        finally:
            with _lock:
                if name in self._users:
                    self._users[name] -= 1

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        with _lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._users.clear()

    def _make_room(self) -> None:
        """Close idle files until one more may be opened: here, and in other pools where the process has too many."""
        self._close_idle(len(self._files) + 1 - _OPEN_FILES)
        for pool in sorted(_pools, key=lambda pool: -len(pool._files)):
            pool._close_idle(sum(len(each._files) for each in _pools) + 1 - self._most_of_all)

    def _close_idle(self, count: int) -> None:
        if count <= 0:
            return
        idle = [name for name in self._files if self._users[name] == 0]
        for name in idle[:count]:
            self._files.pop(name).close()
            del self._users[name]


def files_at_once() -> int:
    """How many files all pools may have open: what the system allows the process, less what others need."""
    if sys.platform == "win32":
        return 4 * _OPEN_FILES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(4, soft - _RESERVED)
