"""One writer per output folder: a lock that the system takes back when its holder dies."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from mergekit_px.errors import OutputLockedError

_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_BEYOND_THE_TEXT = 1 << 20  # Windows locks bytes against reading, so lock one that nobody reads


class DirectoryLock:
    """An exclusive lock on a file, held as long as the process lives or until ``release``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, where: str) -> DirectoryLock:
        """Take the lock or raise ``OutputLockedError`` naming the process that has it. Raises ``OSError``."""
        while True:
            path.parent.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the holder before us has just removed the folder
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno not in _HELD:
                    os.close(descriptor)
                    raise
                holder = os.pread(descriptor, 32, 0) if hasattr(os, "pread") else os.read(descriptor, 32)
                os.close(descriptor)
                pid = holder.decode("ascii", "replace").strip()
                raise OutputLockedError(
                    f"another run is writing there (process {pid or 'unknown'})",
                    where=where,
                    hint="wait for it, or choose another output",
                ) from None
            # The holder before us may have removed the file between our open and our lock.
            if _is_at(descriptor, path):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return cls(path, descriptor)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; a second call does nothing. ``remove``: the file as well."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        if remove and sys.platform != "win32":
            self.path.unlink(missing_ok=True)
        os.close(descriptor)
        if remove and sys.platform == "win32":  # an open file cannot be removed there
            self.path.unlink(missing_ok=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _BEYOND_THE_TEXT, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
