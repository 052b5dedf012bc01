"""``pxmerge acmap classify``: the class of the nearest prototype."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.cli._learning import told
from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli.acmap_options import FeatureOptions, StateFile

Concatenate = Annotated[bool, typer.Option("--concatenate", help="Append the features without any adapter.")]
NoMapping = Annotated[bool, typer.Option("--no-mapping", help="Use the prototypes as they were stored.")]
Result = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write predictions as .npz.  [default: lines on stdout]"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of predictions.")]


def classify(
    state: StateFile,
    source: FeatureOptions,
    output: Result = None,
    concatenate: Concatenate = False,
    no_mapping: NoMapping = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Classify examples by the nearest prototype: the largest cosine with f(x; A_t), over all classes so far.

    Without -o a line of JSON is printed for each example. With labels the accuracy by task and overall is shown.
    Features come from a file, or from data and the model that the prototypes were made with.

    \b
    Examples:
      pxmerge acmap classify --state acmap.safetensors --features test.npz
      pxmerge acmap classify --state acmap.safetensors --data test.npz --base ./vit -o predictions.npz
      pxmerge acmap classify --state acmap.safetensors --features test.npz --json | jq .accuracy
    """
    from mergekit_px.learn.acmap.classify import ClassifyOptions, write_predictions
    from mergekit_px.learn.acmap.classify import classify as classified
    from mergekit_px.learn.acmap.export import require_new

    sink = output_for(json=json, quiet=quiet)
    if output is not None:
        require_new(output, overwrite=overwrite, suffix=".npz")
    options = ClassifyOptions(
        state=state,
        features=source.features,
        data=source.data,
        concatenate=concatenate,
        mapped=not no_mapping,
        model=source.model(),
    )
    found = classified(options, told(sink))
    report: dict[str, Any] = {"output": None if output is None else str(output), **found.report}
    if waiting := report.get("not_mapped"):
        sink.warning(f"merged and not mapped, so left out: task {', '.join(map(str, waiting))}")
    if output is None:
        report["predictions"] = list(found.lines()) if json else []
        for line in () if json else found.lines():
            sink.text(json_text.dumps(line))
    else:
        write_predictions(found, output)
    _show(report, sink)
    sink.document(report)
    if output is not None:
        sink.text(str(output))
    return 0


def _show(report: dict[str, Any], sink: Output) -> None:
    """Accuracy as a table beside a file, and on stderr beside predictions, which have stdout to themselves."""
    accuracy = report.get("accuracy")
    if accuracy is None:
        return
    rows = [(f"task {task}", percent) for task, percent in accuracy["tasks"].items()] + [("all", accuracy["overall"])]
    if report["output"] is not None:
        sink.table([Column("classes of"), Column("accuracy, %", "right")], [(what, f"{x:.2f}") for what, x in rows])
        return
    if sink.is_human:
        sink.note("accuracy: " + ", ".join(f"{what} {percent:.2f} %" for what, percent in rows))
