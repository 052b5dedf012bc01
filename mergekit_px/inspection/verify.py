"""Whether a merged folder still holds the bytes that its lock file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.destination import FILE_SUFFIX, LOCK_FILE, destination
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.index import LARGEST_INDEX, is_inside
from mergekit_px.checkpoint.json_text import read_object, shown
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError


@dataclass(frozen=True)
class Verification:
    """File names by what became of them. ``extra`` files are in the folder and not in the lock file."""

    matching: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    lock: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_intact(self) -> bool:
        """Whether nothing is changed, missing or extra."""
        return not (self.changed or self.missing or self.extra)


def verify(directory: Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Hash every file of a merged folder and compare with its lock file. Hidden files are not looked at.

    Args:
        progress: called with bytes hashed and bytes in all, after each file.

    Raises:
        InputNotFoundError: no such folder, or no lock file in it.
        MalformedCheckpointError: a lock file that cannot be read.
        InputError: a file that cannot be read.
    """
    place = destination(directory)
    lock = read_lock(directory)
    expected: dict[str, dict[str, Any]] = lock["files"]
    paths = directory.rglob("*") if place.file is None else [directory]
    there = {path.relative_to(place.folder).as_posix(): path for path in paths if path.is_file()}
    total = sum(path.stat().st_size for name, path in there.items() if name in expected)
    matching: list[str] = []
    changed: list[str] = []
    done = 0
    for name, entry in expected.items():
        if name not in there:
            continue
        size = there[name].stat().st_size
        is_same = size == entry.get("size", size) and _sha256(there[name]) == entry["sha256"]
        (matching if is_same else changed).append(name)
        done += size
        if progress is not None:
            progress(done, total)
    return Verification(
        matching=tuple(matching),
        changed=tuple(changed),
        missing=tuple(name for name in expected if name not in there),
        extra=tuple(sorted(name for name in there if name not in expected and not _is_aside(name))),
        lock=lock,
    )


def read_lock(directory: Path) -> dict[str, Any]:
    """The lock file of a merged folder, its list of files checked. Raises as ``verify`` does."""
    place = destination(directory)
    path = place.folder / place.lock_file
    if not (directory.is_dir() if place.file is None else directory.exists()):
        kind = "folder" if place.file is None else "file"
        is_file = f"it is a file, and a merge is a folder or a {FILE_SUFFIX} file"
        raise InputNotFoundError(is_file if directory.exists() else f"no such {kind}", where=str(directory))
    try:
        lock = read_object(path, folder=place.folder, limit=LARGEST_INDEX)
    except InputNotFoundError:
        raise InputNotFoundError(
            f"there is no {place.lock_file}", where=str(directory), hint="only what pxmerge has merged can be verified"
        ) from None
    files = lock.get("files")
    if not isinstance(files, dict) or not files:
        raise MalformedCheckpointError("it lists no files", where=str(path))
    for name, entry in files.items():
        if not is_inside(name):
            raise MalformedCheckpointError(f"{shown(name)} is not a path inside the folder", where=str(path))
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise MalformedCheckpointError(f"{shown(name)} has no sha256", where=str(path))
    return lock


def _sha256(path: Path) -> str:
    # What was computed earlier proves nothing here: the bytes on the disk now are what is asked about.
    return file_sha256(path, remember=False)


def _is_aside(name: str) -> bool:
    return name == LOCK_FILE or any(part.startswith(".") for part in name.split("/"))
