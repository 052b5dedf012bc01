"""Single files that are written whole: under another name first, then renamed. And whether they can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mergekit_px.checkpoint.destination import PART_SUFFIX
from mergekit_px.checkpoint.positional import sync, sync_directory
from mergekit_px.errors import OutputError, WriteError


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


def require_writable(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Find out before long work whether a file that it ends with can be written; folders are made on the way to it.

    Args:
        inputs: models, of which those on this machine are left as they are.

    Raises ``OutputError``.
    """
    place = path.resolve()
    for source in map(Path, inputs):
        if source.exists() and source.resolve() in (place, *place.parents):
            raise OutputError(
                f"it would lie in the input {source}",
                where=str(path),
                hint="write it elsewhere; inputs stay as they are",
            )
    if path.is_dir():
        raise OutputError("a file is to be written, and this is a folder", where=str(path), hint="name a file in it")
    try:
        if path.exists():
            with path.open("r+b"):
                return
        home = place.parent
        while not os.path.lexists(home):
            home = home.parent
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"it cannot be written: {reason}", where=str(path), hint="choose another place") from error
