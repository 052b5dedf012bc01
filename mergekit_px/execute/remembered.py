"""Small facts about this machine that are costly to find out again, kept as JSON in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Remembered:
    """A mapping of strings to JSON values in one file. What cannot be read is empty; what cannot be written is lost.

    Args:
        name: the file's name, without a suffix.
        limit: most entries that are kept; the oldest go first.
    """

    def __init__(self, name: str, limit: int = 4096) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._path = Path(home) / "pxmerge" / f"{name}.json"
        self._limit = limit

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._load().get(key)

    def put(self, entries: dict[str, Any]) -> None:
        """Add or replace entries."""
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
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
