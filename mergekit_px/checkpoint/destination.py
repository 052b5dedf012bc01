"""The folder that a run writes into: what is in it, and whether a run may begin there.

<folder>/.pxmerge/lock             held by the run that is writing
<folder>/.pxmerge/journal.jsonl    there as long as a run is unfinished
<folder>/.pxmerge/inputs.json      which files the unfinished run reads
<folder>/.pxmerge/publishing       there once finished files are being put in place
<folder>/.pxmerge/stage/           side files on their way
<folder>/<shard>.part              shards that are not complete
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergekit_px.checkpoint.index import index_name
from mergekit_px.checkpoint.journal import JournalHead, read_head
from mergekit_px.errors import DiskSpaceError, OutputError

STATE_FOLDER = ".pxmerge"
JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"
PUBLISHING_FILE = "publishing"
INPUTS_FILE = "inputs.json"
STAGE_FOLDER = "stage"
PART_SUFFIX = ".part"

CONFIG_FILE = "config.json"
RECIPE_FILE = "pxmerge.yaml"
LOCKFILE = "pxmerge.lock.json"

Mode = Literal["new", "resume", "overwrite"]

_STEMS = ("model", "adapter_model")
_UNRELATED = {"lost+found", ".DS_Store", STATE_FOLDER}  # in folders that their owner calls empty


@dataclass(frozen=True)
class OutputState:
    """What an output folder holds. ``unfinished``: the run that was left there; ``occupied``: anything else."""

    occupied: bool
    unfinished: JournalHead | None


def output_state(directory: Path) -> OutputState:
    """Look at an output folder, which need not exist.

    Raises ``OutputError`` where it is no folder, cannot be read, or holds a journal that cannot be read.
    """
    try:
        names = {entry.name for entry in directory.iterdir()} - _UNRELATED
    except FileNotFoundError:
        return OutputState(False, None)
    except NotADirectoryError:
        raise OutputError("the output is a file, not a folder", where=str(directory)) from None
    except OSError as error:
        raise cannot_use(directory, error) from error
    return OutputState(bool(names), read_head(directory / STATE_FOLDER / JOURNAL_FILE))


def check_mode(directory: Path, mode: Mode, plan_hash: str) -> JournalHead | None:
    """Whether a run of the plan may begin in a folder; the unfinished run that it continues, if any.

    Raises ``OutputError`` with the flag that would help. Reads only, so a plan can ask it too.
    """
    if mode == "overwrite":
        return None
    state = output_state(directory)
    where = str(directory)
    if mode == "new":
        if state.unfinished is not None:
            raise OutputError(
                "an unfinished run is there",
                where=where,
                hint="continue it with --resume or start over with --overwrite",
            )
        if state.occupied:
            raise OutputError(
                "the output folder is not empty", where=where, hint="choose another or allow it with --overwrite"
            )
        return None
    if state.unfinished is None:
        if state.occupied:
            raise OutputError(
                "there is no unfinished run to resume, and the folder is not empty",
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


def cannot_use(directory: Path, error: OSError) -> OutputError:
    """The error for an output folder that the system refuses."""
    return OutputError(
        f"the output folder cannot be used: {error.strerror or error}",
        where=str(directory),
        hint="choose another with -o",
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


def weight_files(directory: Path, stem: str, suffix: str = "") -> list[Path]:
    """The files in ``directory`` that are named as a save of weights is: shards of any split, exactly."""
    stems = "|".join(re.escape(each) for each in {*_STEMS, stem})
    pattern = re.compile(rf"({stems})(-\d{{5,}}-of-\d{{5,}})?\.safetensors{re.escape(suffix)}")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))


def marks_of_completion(directory: Path, stem: str) -> Iterable[Path]:
    """The files whose presence says that an output is complete, most telling first."""
    yield directory / LOCKFILE
    yield directory / CONFIG_FILE
    yield directory / RECIPE_FILE
    for each in sorted({*_STEMS, stem}):
        yield directory / index_name(f"{each}.safetensors")
