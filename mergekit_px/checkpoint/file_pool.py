"""Files opened when first needed and kept open, never more than a few dozen at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mergekit_px.checkpoint.positional import PositionalFile

_OPEN_FILES = 64  # macOS allows a process 256 in all by default


class FilePool:
    """Hands out open files by name to any number of threads.

    ``open_file`` is called when a name is asked for that is not open; what it raises passes through. Beyond
    the limit, files that nobody is using are closed, the one idle the longest first.
    """

    def __init__(self, open_file: Callable[[str], PositionalFile]) -> None:
        self._open_file = open_file
        self._files: OrderedDict[str, PositionalFile] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[PositionalFile]:
        """The open file ``name``, which stays open at least as long as the context."""
        with self._lock:
            if name not in self._files:
                self._files[name] = self._open_file(name)
                self._users[name] = 0
            self._files.move_to_end(name)
            self._users[name] += 1
            self._close_idle()
            file = self._files[name]
        try:
            yield file
        finally:
            with self._lock:
                if name in self._users:
                    self._users[name] -= 1

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._users.clear()

    def _close_idle(self) -> None:
        if len(self._files) <= _OPEN_FILES:
            return
        for name in [name for name in self._files if self._users[name] == 0]:
            if len(self._files) > _OPEN_FILES:
                self._files.pop(name).close()
                del self._users[name]
