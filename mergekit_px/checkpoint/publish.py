"""The last act: finished shards and side files get their names, in an order that never looks complete too early."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_px._version import __version__
from mergekit_px.checkpoint.contents import CONFIG_FILE
from mergekit_px.checkpoint.destination import (
    DIRECTORY_LOCK,
    JOURNAL_FILE,
    LOCK_FILE,
    PARTS_FOLDER,
    PUBLISHING_FILE,
    STAGE_FOLDER,
    STATE_FOLDER,
    Mode,
    cannot_use,
    check_mode,
    destination,
    output_state,
    published_names,
    recorded_files,
    require_folder,
)
from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.journal import Journal
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputLayout
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.positional import sync, sync_directory
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.errors import InputError, UsageError, WriteError

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


def publication_order(names: Iterable[str], indices: Collection[str], lock_file: str) -> list[str]:
    """Side files in their order, then the indices, then ``config.json`` and the lock file."""
    given = list(names)
    last = [name for name in (CONFIG_FILE, lock_file) if name in given]
    return [*(name for name in given if name not in last and name not in indices), *indices, *last]


def stage(
    directory: Path, files: Mapping[str, SideFile], layout: OutputLayout, shards: Mapping[str, PublishedFile]
) -> dict[str, PublishedFile]:
    """Put all side files, complete, beside the output, so that a failure here costs nothing.

    Returns all files of the output in the order in which they are to be published, shards first. Raises
    ``UsageError`` for names that leave the folder, ``InputError`` for paths that cannot be read, ``OSError``.
    """
    place = destination(directory)
    stage_folder = place.state / STAGE_FOLDER
    shutil.rmtree(stage_folder, ignore_errors=True)
    sources: dict[str, SideFile] = {**files, **layout.indices}
    published = dict(shards)
    for name in publication_order(files, layout.indices, place.lock_file):
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


def put_in_place(directory: Path, staged: Mapping[str, Path], replaces: Iterable[str]) -> None:
    """Rename finished files to their names, in their order, after an older output is gone.

    The names are noted first, for ``withdraw`` and for whoever starts over. The older output's lock file goes first
    and the new one comes last, so that at no moment files of both look like one output. Raises ``OSError``.
    """
    place = destination(directory)
    folder = place.folder
    with replacement(place.state / PUBLISHING_FILE) as file:
        file.write("\0".join(staged).encode())
    for name in sorted(replaces, key=_least_complete):
        _remove(folder, name)
    written = {folder / name for name in staged}
    for name, source in staged.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in (CONFIG_FILE, place.lock_file):
            _sync_all(written, folder)
        source.replace(target)
    _sync_all(written, folder)


def _least_complete(name: str) -> int:
    """What says that an output is complete is removed before the rest."""
    return 0 if name.endswith(LOCK_FILE) else 1 if name.endswith(".json") else 2


def _remove(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    if name.endswith(LOCK_FILE):
        sync_directory(directory)
    for folder in (directory / name).parents:
        if folder == directory:
            break
        with suppress(OSError):  # not empty
            folder.rmdir()


def _sync_all(files: Iterable[Path], directory: Path) -> None:
    for folder in {directory, *(folder for file in files for folder in file.parents if directory in folder.parents)}:
        if folder.is_dir():
            sync_directory(folder)


def withdraw(directory: Path, shards: Collection[str]) -> None:
    """Undo a publication that was cut short: shards become parts again, the rest goes. Raises ``OSError``."""
    place = destination(directory)
    state = place.state
    for name in sorted(published_names(directory), key=_least_complete):
        final, part = place.folder / name, state / PARTS_FOLDER / name
        if name in shards and final.exists() and not part.exists():
            part.parent.mkdir(parents=True, exist_ok=True)
            final.replace(part)
        elif name not in shards:
            _remove(place.folder, name)
    (state / PUBLISHING_FILE).unlink(missing_ok=True)


def folder_lock(files: Mapping[str, PublishedFile]) -> bytes:
    """``pxmerge.lock.json`` of what is no merge by a recipe: the files alone."""
    listed = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    document = {"pxmerge_lock": 1, "versions": {"pxmerge": __version__}, "files": listed}
    return (json.dumps(document, indent=2) + "\n").encode()


@contextmanager
def new_folder(directory: Path, *, overwrite: bool, record: bool = True) -> Iterator[Path]:
    """An empty folder to write complete files in, which are then given their names in ``directory`` together.

    Killed before that, the output is what it was; killed between two renames, no lock file is there, and ``new_folder``
    says that the output is unfinished unless it may overwrite. An error leaves what was there before.

    Args:
        record: list the files in a lock file, by which they can be verified and replaced later.

    Raises:
        OutputError, OutputLockedError: as for a run.
        WriteError: the disk refuses.
    """
    require_folder(directory)
    mode: Mode = "overwrite" if overwrite else "new"
    state = directory / STATE_FOLDER
    made = not directory.exists()
    try:
        check_mode(directory, mode, "")
        directory.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.take(state / DIRECTORY_LOCK, str(directory))
    except OSError as error:
        raise cannot_use(directory, error) from error
    stage_folder = state / STAGE_FOLDER
    begun = False
    try:
        unfinished = check_mode(directory, mode, "") or output_state(directory).unfinished
        begun = bool(published_names(directory))
        older = unfinished.replaces if unfinished is not None else ()
        replaces = {*recorded_files(directory), *published_names(directory), *older}
        Journal.create(state / JOURNAL_FILE, "", replaces=sorted(replaces)).close()
        shutil.rmtree(stage_folder, ignore_errors=True)
        shutil.rmtree(state / PARTS_FOLDER, ignore_errors=True)
        stage_folder.mkdir()
        yield stage_folder
        names = sorted(
            (path.relative_to(stage_folder).as_posix() for path in stage_folder.rglob("*") if path.is_file()),
            key=lambda name: (name.endswith(".json"), name),
        )
        if record:
            files = {name: _synced(stage_folder / name) for name in names}
            _write_staged(folder_lock(files), stage_folder / LOCK_FILE)
            names.append(LOCK_FILE)
        begun = True
        put_in_place(directory, {name: stage_folder / name for name in names}, replaces)
        begun = False
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(directory)) from error
    finally:
        # Between two renames the state stays, so that what is there is known to be unfinished.
        if not begun:
            shutil.rmtree(state, ignore_errors=True)
        lock.release(remove=not begun)
        if made and not begun:
            with suppress(OSError):
                directory.rmdir()


def _synced(path: Path) -> PublishedFile:
    with path.open("rb+") as file:
        sync(file.fileno())
        return PublishedFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
