"""Single files that are written whole: under another name first, forced to disk, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mergekit_px.checkpoint.destination import PART_SUFFIX
from mergekit_px.checkpoint.positional import sync, sync_directory
from mergekit_px.errors import WriteError


@contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes a path's place when all is written: what has the path's name is always complete.

    Raises:
        WriteError: the disk refuses.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        part.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error
