"""The folder or file that a run writes: what is there, and whether a run may begin.

<folder>/.pxmerge/lock             held by the run that is writing
<folder>/.pxmerge/journal.jsonl    there as long as a run is unfinished
<folder>/.pxmerge/inputs.json      which files the unfinished run reads
<folder>/.pxmerge/publishing       names of finished files, there once they are being put in place
<folder>/.pxmerge/parts/           shards that are not complete
<folder>/.pxmerge/stage/           other files on their way
<folder>/pxmerge.lock.json         lists every file of a finished output; it comes last and goes first

An output that is one file, NAME.safetensors, has .NAME.pxmerge/ and NAME.pxmerge.lock.json beside it in their place.

What the lock file lists, and nothing else, is removed when an output is replaced. A folder that holds anything more is
left alone, and so is every input.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergekit_px.checkpoint.index import LARGEST_INDEX, is_inside
from mergekit_px.checkpoint.journal import JournalHead, read_head
from mergekit_px.checkpoint.json_text import read_object, shown
from mergekit_px.checkpoint.object_store import written_address
from mergekit_px.errors import DiskSpaceError, InputError, OutputError

STATE_FOLDER = ".pxmerge"
JOURNAL_FILE = "journal.jsonl"
DIRECTORY_LOCK = "lock"
PUBLISHING_FILE = "publishing"
INPUTS_FILE = "inputs.json"
PARTS_FOLDER = "parts"
STAGE_FOLDER = "stage"
PART_SUFFIX = ".part"

RECIPE_FILE = "pxmerge.yaml"
LOCK_FILE = "pxmerge.lock.json"

Mode = Literal["new", "resume", "overwrite"]

_NAMED = 3  # of the files that are in the way
_UNRELATED = {"lost+found", ".DS_Store", STATE_FOLDER}  # in folders that their owner calls empty


FILE_SUFFIX = ".safetensors"
"""Of an output that is one file."""
_OTHER_FILES = {
    ".safetensor",
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".npz",
    ".h5",
    ".json",
    ".yaml",
    ".yml",
}
"""Files that people mean by such a name and would get a folder for; version numbers and the like are no suffixes."""


@dataclass(frozen=True)
class Destination:
    """Where an output and what belongs to it are.

    Attributes:
        folder: that the names of its files are relative to.
        state: the folder of an unfinished run.
        lock_file: the name of the file that lists a finished output.
        file: the name of the one file that the output is; None for a whole folder.
    """

    folder: Path
    state: Path
    lock_file: str
    file: str | None = None


def destination(output: Path) -> Destination:
    """A path that ends in .safetensors, and is no folder already, is one file. Raises ``OutputError`` for a store."""
    if (address := written_address(output)) is not None:
        raise OutputError(
            "only merges are written to a store", where=address, hint="give a folder with -o, and copy it there"
        )
    if output.suffix != FILE_SUFFIX or output.is_dir():
        return Destination(output, output / STATE_FOLDER, LOCK_FILE)
    folder, stem = output.parent, output.stem
    return Destination(folder, folder / f".{stem}.pxmerge", f"{stem}.{LOCK_FILE}", output.name)


def require_folder(output: Path) -> None:
    """Raise ``OutputError`` for the name of one file, where a folder is written."""
    if destination(output).file is not None:
        raise OutputError(
            "the output is a folder, and this is the name of a file", where=str(output), hint="give another with -o"
        )


@dataclass(frozen=True)
class OutputState:
    """What an output holds. ``unfinished``: the run that was left there; ``occupied``: anything else."""

    occupied: bool
    unfinished: JournalHead | None


def output_state(directory: Path) -> OutputState:
    """Look at an output, which need not exist.

    Raises ``OutputError`` where it is no folder, cannot be read, or holds a journal that cannot be read.
    """
    place = destination(directory)
    if place.file is not None:
        return OutputState(os.path.lexists(directory), read_head(place.state / JOURNAL_FILE))
    try:
        names = {entry.name for entry in directory.iterdir()} - _UNRELATED
    except FileNotFoundError:
        return OutputState(False, None)
    except NotADirectoryError:
        raise OutputError("the output is a file, not a folder", where=str(directory)) from None
    except OSError as error:
        raise cannot_use(directory, error) from error
    return OutputState(bool(names), read_head(place.state / JOURNAL_FILE))


def check_mode(directory: Path, mode: Mode, plan_hash: str) -> JournalHead | None:
    """Whether a run of the plan may write an output; the unfinished run that it continues, if any.

    Raises ``OutputError`` with the flag that would help. Reads only, so a plan can ask it too.
    """
    if directory.suffix.lower() in _OTHER_FILES and not directory.is_dir():
        raise OutputError(
            f"the output is a folder or a {FILE_SUFFIX} file, and '{directory.suffix}' names another kind of file",
            where=str(directory),
            hint="choose another with -o",
        )
    if mode == "overwrite":
        check_replaceable(directory)
        return None
    state = output_state(directory)
    where = str(directory)
    full = "there is such a file already" if destination(directory).file else "the output folder is not empty"
    if mode == "new":
        if state.unfinished is not None and state.unfinished.plan_hash:
            raise OutputError(
                "an unfinished run is there",
                where=where,
                hint="continue it with --resume or start over with --overwrite",
            )
        if state.unfinished is not None and state.occupied:
            raise OutputError(
                "a command was killed while it put its files there", where=where, hint="start over with --overwrite"
            )
        if state.occupied:
            raise OutputError(full, where=where, hint="choose another or allow it with --overwrite")
        return None
    if state.unfinished is None:
        if state.occupied:
            raise OutputError(
                f"there is no unfinished run to resume, and {full}",
                where=where,
                hint="it may be complete already; --overwrite starts over",
            )
        return None
    if state.unfinished.plan_hash != plan_hash:
        raise OutputError(
            "the unfinished run there has another plan: the recipe, the inputs or the options changed since",
            where=where,
            hint="go back to them, or start over with --overwrite",
        )
    return state.unfinished


def check_replaceable(directory: Path) -> None:
    """Raise ``OutputError`` if an output holds anything that no lock file and no unfinished run of it lists."""
    place = destination(directory)
    own = {*recorded_files(directory), *published_names(directory)}
    with suppress(OutputError):  # a journal that cannot be read is what starting over is for
        head = read_head(place.state / JOURNAL_FILE)
        own.update(head.replaces if head is not None else ())
    try:
        foreign = [name for name in _files(directory) if name not in own]
    except OSError as error:
        raise cannot_use(directory, error) from error
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        also = "the folder also holds" if place.file is None else "that does not list"
        raise OutputError(
            f"--overwrite replaces what its {place.lock_file} lists, and {also}"
            f" {', '.join(map(shown, foreign[:_NAMED]))}{more}",
            where=str(directory),
            hint="choose another output, or move them away",
        )


def recorded_lock(directory: Path) -> Mapping[str, Any]:
    """The lock file of a finished output; empty where none can be read."""
    try:
        place = destination(directory)
        return read_object(place.folder / place.lock_file, folder=place.folder, limit=LARGEST_INDEX)
    except InputError:
        return {}


def recorded_files(directory: Path) -> tuple[str, ...]:
    """The files of a finished output, its lock file first; none where no lock file can be read."""
    place = destination(directory)
    files = recorded_lock(directory).get("files")
    if not isinstance(files, dict):
        return ()
    return (place.lock_file, *(name for name in files if is_inside(name) and place.file in (None, name)))


def published_names(directory: Path) -> tuple[str, ...]:
    """The files that a killed run was putting in place."""
    try:
        text = (destination(directory).state / PUBLISHING_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(name for name in text.split("\0") if name and is_inside(name))


def _files(directory: Path) -> list[str]:
    """Everything of an output that is no folder itself, but for the state of a run; links are not followed."""
    if (file := destination(directory).file) is not None:
        return [file] if os.path.lexists(directory) else []
    if not directory.is_dir():
        return []
    names = []
    for entry in sorted(directory.iterdir()):
        if entry.name in _UNRELATED:
            continue
        if entry.is_symlink() or not entry.is_dir():
            names.append(entry.name)
        else:
            names += [path.relative_to(directory).as_posix() for path in sorted(entry.rglob("*"))
                      if path.is_symlink() or not path.is_dir()]  # fmt: skip
    return names


def real_path(path: Path) -> Path:
    """Where a path leads; one of links in a circle leads nowhere, and stays as it is for the system to refuse."""
    return Path(os.path.realpath(path))


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raise ``OutputError`` if an output is an input, in one, around one, or what a link in one points at.

    Args:
        inputs: files and folders on this machine; a folder beside an input that is a file is free.
    """
    place = real_path(output)
    for source in inputs:
        home = real_path(source)
        targets = [home]
        if home.is_dir():
            targets += [real_path(path) for path in home.iterdir() if path.is_symlink()]
        for target in targets:
            if place == target or place in target.parents or (target.is_dir() and target in place.parents):
                raise OutputError(
                    f"the output is, or holds, or lies in the input {source}",
                    where=str(output),
                    hint="write somewhere else; inputs are never changed",
                )


def cannot_use(directory: Path, error: OSError) -> OutputError:
    """The error for an output folder that the system refuses."""
    return OutputError(
        f"the output cannot be used: {error.strerror or error}",
        where=str(directory),
        hint="raise the limit on files (ulimit -f)" if error.errno == errno.EFBIG else "choose another with -o",
    )


def check_space(directory: Path, need: int) -> None:
    """Raise ``DiskSpaceError`` if ``need`` more bytes do not fit where ``directory`` is (or would be made)."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise cannot_use(directory, error) from error
    if need > free:
        raise not_enough_space(directory, need, free)


def not_enough_space(directory: Path, need: int, free: int) -> DiskSpaceError:
    """The error for an output that does not fit."""
    return DiskSpaceError(
        f"the output needs {need:,} more bytes of disk, {free:,} are free",
        where=str(directory),
        hint="make room or choose another output with -o",
    )
