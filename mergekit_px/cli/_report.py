"""The report that ``--report`` asks a merge for, and where a page may be written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.replacement import require_writable
from mergekit_px.cli._output import Output
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import UsageError, WriteError

if TYPE_CHECKING:
    from mergekit_px.execute.events import RunResult
    from mergekit_px.plan.model import Plan

_SUFFIXES = (".html", ".htm")


def report_run(plan: Plan, result: RunResult, path: Path, output: Output) -> None:
    """The page of a merge that has just been done.

    Raises:
        InputError: a tensor that cannot be read.
        WriteError: the disk refuses.
    """
    from mergekit_px.cli._report_page import merge_page
    from mergekit_px.execute.run import fetch_inputs
    from mergekit_px.inspection.merge_report import merge_report

    with progress_on(output) as advance:
        found = merge_report(fetch_inputs(plan), result.output, result=result, progress=partial(advance, "measuring"))
    write_page(path, merge_page(found))
    output.note(f"report: {path}")


def check_page(path: Path, directory: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raises ``UsageError`` for a page that is not called one, or that would make the merge fail its verification;
    ``OutputError`` where none can be written."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"the report is an HTML page, and '{path.name}' is not called one", hint="name a .html file")
    if directory.resolve() in path.resolve().parents:
        raise UsageError(
            f"{path} would be inside the merge, whose lock file does not list it", hint="write it beside the folder"
        )
    require_writable(path, inputs)


def write_page(path: Path, page: str) -> None:
    """Write a page. Raises ``WriteError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"the report cannot be written: {error.strerror or error}", where=str(path)) from error
