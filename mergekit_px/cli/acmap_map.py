"""``pxmerge acmap map``: a task's class prototypes, and those of earlier tasks brought up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import resumable, told
from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli.acmap_options import FeatureOptions, StateFile
from mergekit_px.errors import UsageError

TaskNumber = Annotated[
    int | None, typer.Option("--task", metavar="T", min=1, help="Its number.  [default: the next one]")
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--classes", metavar="C...", help="Its classes, to be checked.  [default: those of the labels]"),
    Several("--classes", "numbers"),
]
Oracle = Annotated[
    list[str] | None,
    typer.Option("--oracle", metavar="FILE...", help="Earlier tasks' examples, to measure the drift on."),
    Several("--oracle"),
]
Concatenate = Annotated[bool, typer.Option("--concatenate", help="Keep features without any adapter too.")]
Result = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write the prototypes here, and a report beside them."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Take up the finished passes of an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of prototypes.")]


def map_(
    state: StateFile,
    source: FeatureOptions,
    task: TaskNumber = None,
    classes: Classes = None,
    oracle: Oracle = None,
    concatenate: Concatenate = False,
    output: Result = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Add a task's class prototypes to the state, and move those of earlier tasks to the newest merged adapter.

    A prototype is the mean feature of a class under the merged adapter of its task; it is stored once. When a later
    adapter is merged, each earlier task's prototypes are moved by how far the mean feature of the new task's data
    moved between the two merged adapters (centroid prototype mapping, arXiv 2412.18219). No old data are needed.

    Features come from a file (features under the merged adapter of this task, features_1, features_2, ... under
    those of 1, 2, ... tasks, and labels) or from data and a model, which is run once for each of those adapters. The
    same file again changes nothing; after an interruption the same command goes on.

    \b
    Examples:
      pxmerge acmap map --state acmap.safetensors --features task2.npz
      pxmerge acmap map --state acmap.safetensors --data task2.npz --base ./vit
      pxmerge acmap map --state acmap.safetensors --data task2.npz --model vit.py:make --allow-code
      pxmerge acmap map --state acmap.safetensors --features task2.npz -o prototypes.safetensors
    """
    numbers = None if classes is None else tuple(_class_number(word) for word in classes)
    from mergekit_px.learn.acmap.export import require_new
    from mergekit_px.learn.acmap.mapping import MapOptions, map_task

    sink = output_for(json=json, quiet=quiet)
    if output is not None:
        require_new(output, overwrite=overwrite or resume)
    options = MapOptions(
        state=state,
        features=source.features,
        data=source.data,
        task=task,
        classes=numbers,
        oracle=tuple(oracle or ()),
        concatenate=concatenate,
        model=source.model(),
        resume=resume,
        output=output,
    )
    with resumable():
        report = map_task(options, told(sink))
    _show(report, sink)
    sink.document({"output": None if output is None else str(output), **report})
    sink.text(str(output or state))
    return 0


def _class_number(word: str) -> int:
    if not word.isdecimal():
        raise UsageError(f"'{word}' is not the number of a class", where="--classes", hint="give whole numbers from 0")
    return int(word)


def _show(report: dict[str, Any], sink: Output) -> None:
    if report["was_mapped_already"]:
        sink.note(f"task {report['task']} was mapped from this file already; nothing changed")
    else:
        sink.note(
            f"task {report['task']}: {len(report['classes'])} classes, {report['examples']} examples,"
            f" features of {report['dimension']} numbers"
        )
    if report["L"] and report["task"] > report["L"]:
        sink.note(f"the merged adapter stays as it is after task {report['L']}, so nothing has to be moved")
    drift = report["drift"]["tasks"] if report["drift"] else {}
    rows = [
        (number, f"{shift['norm']:.4g}", f"{shift['relative']:.4f}", *_drift_cells(drift.get(number)))
        for number, shift in report["shifts"].items()
    ]
    columns = [Column("task", "right"), Column("moved by", "right"), Column("relative", "right")]
    if drift:
        columns += [Column("drift before", "right"), Column("drift after", "right")]
    sink.table(columns, rows if drift else [row[:3] for row in rows])


def _drift_cells(drift: dict[str, Any] | None) -> tuple[str | None, str | None]:
    return (None, None) if drift is None else (f"{drift['before']:.4f}", f"{drift['after']:.4f}")
