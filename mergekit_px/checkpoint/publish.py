"""The last act: finished shards and side files get their names, in an order that never looks complete too early."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.checkpoint.destination import (
    CONFIG_FILE,
    LOCKFILE,
    PART_SUFFIX,
    PUBLISHING_FILE,
    STAGE_FOLDER,
    STATE_FOLDER,
    marks_of_completion,
    weight_files,
)
from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputLayout
from mergekit_px.checkpoint.positional import sync
from mergekit_px.errors import InputError, UsageError

_LAST = (CONFIG_FILE, LOCKFILE)
_PIECE = 1 << 20


@dataclass(frozen=True)
class PublishedFile:
    """One file of a complete output; ``sha256`` in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A complete output: every file that the run put there, by name relative to ``directory``."""

    directory: Path
    files: Mapping[str, PublishedFile]


SideFile = bytes | Path | Callable[[Mapping[str, PublishedFile]], bytes]
"""What a side file is made from: its bytes; a file to copy; or a function of the files published before it."""


def publication_order(names: Iterable[str], index_file: str | None) -> list[str]:
    """Side files in their order, then the index, then ``config.json`` and the lock file."""
    given = list(names)
    first = [name for name in given if name not in _LAST and name != index_file]
    return [*first, *([index_file] if index_file else []), *(name for name in _LAST if name in given)]


def stage(
    directory: Path, files: Mapping[str, SideFile], layout: OutputLayout, shards: Mapping[str, PublishedFile]
) -> dict[str, PublishedFile]:
    """Put all side files, complete, beside the output, so that a failure here costs nothing.

    Returns all files of the output in the order in which they are to be published, shards first. Raises
    ``UsageError`` for names that leave the folder, ``InputError`` for paths that cannot be read, ``OSError``.
    """
    stage_folder = directory / STATE_FOLDER / STAGE_FOLDER
    shutil.rmtree(stage_folder, ignore_errors=True)
    sources: dict[str, SideFile] = dict(files)
    if layout.index is not None:
        sources[layout.index_file] = layout.index
    published = dict(shards)
    for name in publication_order(files, layout.index_file if layout.index is not None else None):
        if not is_inside(name) or name in shards or name.split("/")[0] == STATE_FOLDER:
            raise UsageError(f"{shown(name)} is not a name for a file beside the weights")
        target = stage_folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = sources[name]
        if callable(source):
            source = source(dict(published))
        published[name] = _write_staged(source, target)
    return published


def _write_staged(source: bytes | Path, target: Path) -> PublishedFile:
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as out:
        for piece in _pieces(source):
            out.write(piece)
            digest.update(piece)
            size += len(piece)
        out.flush()
        sync(out.fileno())
    return PublishedFile(size, digest.hexdigest())


def _pieces(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    try:
        with source.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise InputError(f"cannot be copied: {error.strerror or error}", where=str(source)) from error


def put_in_place(
    directory: Path, layout: OutputLayout, published: Mapping[str, PublishedFile], *, replaces: bool
) -> None:
    """Rename everything to its name: shards, side files, index, ``config.json``, lock file.

    With ``replaces`` an older output goes first: what says that it is complete, then those of its shards that
    are not overwritten. A marker tells ``withdraw`` that this was begun. Raises ``OSError``.
    """
    state = directory / STATE_FOLDER
    (state / PUBLISHING_FILE).touch()
    sync_directory(state)
    shards = {shard.file for shard in layout.shards}
    if replaces:
        for path in marks_of_completion(directory, layout.stem):
            path.unlink(missing_ok=True)
        sync_directory(directory)
        for path in weight_files(directory, layout.stem):
            if path.name not in shards:
                path.unlink()
    for name in shards:
        (directory / f"{name}{PART_SUFFIX}").replace(directory / name)
    sync_directory(directory)
    for name in published:
        if name in shards:
            continue
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in _LAST:
            sync_directory(directory)
        (state / STAGE_FOLDER / name).replace(target)
    sync_directory(directory)


def withdraw(directory: Path, layout: OutputLayout) -> None:
    """Undo a publication that was cut short: complete names become ``.part`` again. Raises ``OSError``."""
    if not (directory / STATE_FOLDER / PUBLISHING_FILE).exists():
        return
    for path in marks_of_completion(directory, layout.stem):
        path.unlink(missing_ok=True)
    for shard in layout.shards:
        final, part = directory / shard.file, directory / f"{shard.file}{PART_SUFFIX}"
        if final.exists() and not part.exists():
            final.replace(part)
    (directory / STATE_FOLDER / PUBLISHING_FILE).unlink()


def sync_directory(directory: Path) -> None:
    """Make renames in a folder last, where the system allows folders to be synced. Raises ``OSError``."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
