"""The folder that a run writes into: free, or held by an unfinished run of the same plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.errors import OutputError, WriteError

Mode = Literal["new", "resume", "overwrite"]


@contextmanager
def working_folder(output: Path, name: str, mode: Mode, plan_hash: str) -> Iterator[Path]:
    """A locked folder ``name`` in the output for the states of an unfinished run; it goes when it is empty.

    Raises:
        OutputError: the output is not free, or holds an unfinished run of another plan.
        OutputLockedError: another process works there.
    """
    work = output / name
    record = work / "run.json"
    try:
        _require_usable(output, record, mode, plan_hash)
        work.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.take(work / "lock", str(output))
    except OSError as error:
        what = f"the output folder cannot be used: {error.strerror or error}"
        raise OutputError(what, where=str(output), hint="choose another with -o") from error
    try:
        if mode == "overwrite":
            for state in work.glob("*.safetensors"):
                state.unlink()
        write_json(record, {"plan_hash": plan_hash})
        yield work
    finally:
        if not any(work.glob("*.safetensors")):  # nothing to resume
            shutil.rmtree(work, ignore_errors=True)
        lock.release(remove=not work.exists())
        if output.exists() and not any(output.iterdir()):
            output.rmdir()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file by a document. Raises ``WriteError``."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text. Raises ``WriteError``."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error


def _require_usable(output: Path, record: Path, mode: Mode, plan_hash: str) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError("the output is a file, not a folder", where=str(output), hint="choose another with -o")
    unfinished = record.exists()
    if mode == "overwrite" or not output.exists():
        return
    if not unfinished and all(one == record.parent for one in output.iterdir()):
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
    if json.loads(record.read_text(encoding="utf-8")).get("plan_hash") != plan_hash:
        raise OutputError(
            "the unfinished run there is another: inputs or options changed since",
            where=str(output),
            hint="go back to them, or start over with --overwrite",
        )
