"""The folder that a run writes into: free, or held by an unfinished run of the same plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.destination import Mode
from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.errors import InputError, OutputError
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.state import other_plan

_RECORD = "run.json"
_LOCK = "lock"


@contextmanager
def working_folder(output: Path, name: str, mode: Mode, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A locked folder ``name`` in the output for what an unfinished run keeps; it goes when nothing is left in it.

    Args:
        identity: plain data that names the plan.

    Raises:
        OutputError: the output is not free, or holds an unfinished run of another plan.
        OutputLockedError: another process works there.
    """
    work = output / name
    try:
        _require_usable(output, work, mode, identity)
        work.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.take(work / _LOCK, str(output))
    except OSError as error:
        what = f"the output folder cannot be used: {error.strerror or error}"
        raise OutputError(what, where=str(output), hint="choose another with -o") from error
    try:
        if mode == "overwrite":
            for file in _kept(work):
                file.unlink()
        write_json(work / _RECORD, identity)
        yield work
    finally:
        if not _kept(work):  # nothing to resume
            shutil.rmtree(work, ignore_errors=True)
        lock.release(remove=not work.exists())
        if output.exists() and not any(output.iterdir()):
            output.rmdir()


def _kept(work: Path) -> list[Path]:
    """What a run could go on from."""
    own = (work / _RECORD, work / _LOCK)
    return [one for one in work.rglob("*") if one.is_file() and one not in own and one.suffix != ".part"]


def _require_usable(output: Path, work: Path, mode: Mode, identity: Mapping[str, Any]) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError("the output is a file, not a folder", where=str(output), hint="choose another with -o")
    record = work / _RECORD
    unfinished = record.exists()
    if mode == "overwrite" or not output.exists():
        return
    if not unfinished and all(one == work for one in output.iterdir()):
        return  # empty, or a run was ended before it began
    if mode == "new":
        if unfinished:
            hint = "continue it with --resume or start over with --overwrite"
            raise OutputError("an unfinished run is there", where=str(output), hint=hint)
        hint = "choose another with -o or allow it with --overwrite"
        raise OutputError("the output folder is not empty", where=str(output), hint=hint)
    if not unfinished:
        raise OutputError(
            "there is no unfinished run to resume, and the folder is not empty",
            where=str(output),
            hint="it may be complete already; --overwrite starts over",
        )
    try:
        found = read_object(record)
    except InputError:
        found = None
    if found != identity:
        raise other_plan(output)
