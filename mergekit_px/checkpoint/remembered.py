"""Small facts about this machine that are costly to find out again, kept as JSON in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.errors import InputError


class Remembered:
    """A mapping of strings to JSON values in one file. What cannot be read is empty; what cannot be written is lost.

    Args:
        name: the file's name, without a suffix.
        limit: most entries that are kept; the oldest go first.
    """

    def __init__(self, name: str, limit: int = 4096) -> None:
        self._path = user_cache() / f"{name}.json"
        self._limit = limit

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._load().get(key)

    def put(self, entries: dict[str, Any]) -> None:
        """Add or replace entries."""
        if not self._path.is_absolute():
            return
        with contextlib.suppress(OSError):
            known = self._load()
            for key in entries:
                known.pop(key, None)
            known |= entries
            kept = dict(list(known.items())[-self._limit :])
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(self._path)

    def _load(self) -> dict[str, Any]:
        try:
            status = self._path.stat()
            return dict(_read(self._path, (status.st_mtime_ns, status.st_size, status.st_ino)))
        except (OSError, InputError):
            return {}


@functools.lru_cache(maxsize=4)
def _read(path: Path, identity: tuple[int, ...]) -> dict[str, Any]:
    """Read once for each state of the file: a run asks for a hash of every file of every input."""
    return read_object(path, strict=False)


def user_cache() -> Path:
    """The folder of this program in the user's cache; relative where the system knows no such folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _cache_folder()) / "pxmerge"


def _cache_folder() -> str | Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user that the system does not know, as in some containers
        return ""
