"""``pxmerge compare``: how models differ."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._progress import progress_on

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, files, org/name or org/name@revision.")]
Reference = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="What the models are compared with; the first of them if left out."),
]
Pattern = Annotated[str, typer.Option("--tensors", metavar="GLOB", help="Only tensors of such names.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Rows of the table; 0 for all.")]


def compare(
    models: Models,
    base: Reference = None,
    tensors: Pattern = "*",
    limit: Limit = 20,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure how models differ from the first of them, or from --base, tensor by tensor and in total.

    With r a tensor of the reference, x that of a model and d = x - r: "relative" is |d| / |r| in the 2-norm,
    "largest" the largest element of |d|, "cosine" that of x and r. Between two models or more, also the cosine of
    their d, and "conflicts": the share of changed elements whose d differ in sign.

    Tensors stand in the order of their relative difference. They are read in pieces, so memory stays small.

    \b
    Examples:
      pxmerge compare ./base ./finetuned
      pxmerge compare ./math ./code --base ./base --tensors "*.mlp.*" --limit 0
    """
    from mergekit_px.errors import UsageError
    from mergekit_px.inspection.compare import compare as measure
    from mergekit_px.inspection.source import fetch_source, open_source

    if len(models) < 2 and base is None:
        raise UsageError("one model alone cannot be compared", hint="give another, or --base")
    output = output_for(json=json, quiet=quiet)
    references = models if base is None else [base, *models]
    opened = [open_source(reference, allow_pickle=allow_pickle) for reference in references]
    with progress_on(output) as advance:
        sources = [fetch_source(source, partial(advance, f"fetching {source.reference}")) for source in opened]
        checkpoints = [source.checkpoint for source in sources]
        document = measure(
            checkpoints[0],
            checkpoints[1:],
            pattern=tensors,
            progress=partial(advance, "comparing"),
        )
    output.document(document)
    _show_total(document, output)
    _show_tensors(document, limit, output)
    _show_rest(document, output)
    return 0


def _show_total(document: dict[str, Any], output: Output) -> None:
    total = document["total"]
    output.heading(f"In total, against {document['reference']}")
    columns = [
        Column("model"),
        Column("relative", "right"),
        Column("difference", "right", essential=False),
        Column("largest", "right", essential=False),
        Column("cosine", "right"),
        Column("equal tensors", "right"),
    ]
    rows = [
        (
            name,
            _number(entry["relative"]),
            _number(entry["difference"]),
            _number(entry["largest"]),
            _number(entry["cosine"]),
            f"{entry['tensors_equal']} of {entry['tensors']}",
        )
        for name, entry in zip(document["models"], total["models"], strict=True)
    ]
    output.table(columns, rows)
    if len(document["models"]) > 1:
        output.heading("Cosines of the differences")
        cosines = [
            (name, *map(_number, row)) for name, row in zip(document["models"], total["delta_cosines"], strict=True)
        ]
        output.table([Column(""), *(Column(name, "right") for name in document["models"])], cosines)
        output.text(f"sign conflicts: {_share(total['sign_conflicts'])} of the changed elements")


def _show_tensors(document: dict[str, Any], limit: int, output: Output) -> None:
    several = len(document["models"]) > 1
    columns = [Column("tensor")]
    for name in document["models"]:
        prefix = f"{name}: " if several else ""
        columns += [Column(f"{prefix}relative", "right"), Column(f"{prefix}largest", "right", essential=False)]
        columns += [Column(f"{prefix}cosine", "right", essential=not several)]
    columns += [Column("conflicts", "right")] if several else []
    shown = document["tensors"][: limit or None]
    rows = []
    for row in shown:
        cells = [row["name"]]
        for entry in row["models"]:
            relative = "equal" if entry["identical"] else _number(entry["relative"])
            cells += [relative, _number(entry["largest"]), _number(entry["cosine"])]
        rows.append([*cells, _share(row["sign_conflicts"])] if several else cells)
    output.heading("By tensor")
    output.table(columns, rows)
    left = len(document["tensors"]) - len(shown)
    if left:
        output.text(f"and {left} more (all with --limit 0)")


def _show_rest(document: dict[str, Any], output: Output) -> None:
    for entry in document["missing"]:
        output.text(f"not in {', '.join(entry['not_in'])}: {entry['name']}")
    for entry in document["mismatched"]:
        output.text(f"shapes differ: {entry['name']}: {' and '.join(map(str, entry['shapes']))}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
