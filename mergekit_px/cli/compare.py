"""``pxmerge compare``: how models differ."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.checkpoint.replacement import require_writable
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import TensorMismatchError, UsageError, WriteError

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, files, org/name or org/name@revision.")]
Reference = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="What the models are compared with; the first of them if left out."),
]
Pattern = Annotated[str, typer.Option("--tensors", metavar="GLOB", help="Only tensors of such names.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Rows of each list; 0 for all.")]
Spectral = Annotated[
    bool,
    typer.Option("--spectral", help="Also decompose the differences: effective ranks, and how far subspaces agree."),
]
Picture = Annotated[
    Path | None,
    typer.Option("--picture", metavar="FILE", help="Draw heat maps by layer and module: a .png or .svg file."),
]


def compare(
    models: Models,
    base: Reference = None,
    tensors: Pattern = "*",
    limit: Limit = 20,
    spectral: Spectral = False,
    picture: Picture = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure how models differ from the first of them, or from --base, tensor by tensor and in total.

    With r a tensor of the reference, x that of a model and d = x - r: "relative" is |d| / |r| in the 2-norm,
    "largest" the largest element of |d|, "cosine" that of x and r. Between two models or more, also the cosine of
    their d, and "conflicts": the share of changed elements whose d differ in sign.

    With --spectral, of each d as a matrix: "rank", its effective rank (the exponential of the entropy of its
    singular values); between models "aligned", the share of one d's norm within the leading left singular vectors
    of another's, both ways (subspace alignment ratio, arXiv:2502.04959). In total these are means over matrices.

    Tensors stand in the order of their relative difference. They are read in pieces, so memory stays small;
    with --spectral one tensor is held whole.

    With --picture, heat maps of relative differences, conflicts and cosines, layers across and modules down.

    \b
    Examples:
      pxmerge compare ./base ./finetuned
      pxmerge compare ./math ./code --base ./base --tensors "*.mlp.*" --limit 0
      pxmerge compare ./math ./code --base ./base --spectral
      pxmerge compare ./math ./code --base ./base --picture differences.svg
    """
    from mergekit_px.inspection.compare import compare as measure
    from mergekit_px.inspection.comparison import ComparisonDocument
    from mergekit_px.plan.inputs import fetch_input, open_input

    if len(models) < 2 and base is None:
        raise UsageError("one model alone cannot be compared", hint="give another, or --base")
    if picture is not None:
        _check_picture(picture, models if base is None else [base, *models])
    output = output_for(json=json, quiet=quiet)
    references = models if base is None else [base, *models]
    opened = [open_input(reference, allow_pickle=allow_pickle) for reference in references]
    with progress_on(output) as advance:
        sources = [fetch_input(source, partial(advance, f"fetching {source.reference}")) for source in opened]
        checkpoints = [source.checkpoint for source in sources]
        document = measure(
            checkpoints[0],
            checkpoints[1:],
            pattern=tensors,
            spectral=spectral,
            progress=partial(advance, "comparing"),
        )
    output.document(document, ComparisonDocument)
    for note in document["notes"]:
        output.note(f"note: {note}")
    if document["tensors"]:
        _show_total(document, output)
        _show_tensors(document, limit, output)
    _show_rest(document, limit, output)
    if not document["tensors"]:
        raise TensorMismatchError(
            "no tensor is in all models in the same shape",
            where=", ".join(references),
            hint="compare models of one architecture; --tensors takes a glob of names",
        )
    if picture is not None:
        _draw(document, picture, output)
    return 0


def _check_picture(path: Path, inputs: list[str]) -> None:
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"a picture is a .png or .svg file, not '{path.name}'", hint="--picture differences.svg")
    require_writable(path, inputs)
    import matplotlib  # noqa: F401  # before the models are read


def _draw(document: dict[str, Any], path: Path, output: Output) -> None:
    from mergekit_px.inspection.comparison import comparison_maps
    from mergekit_px.pictures.drawing import draw

    grids = comparison_maps(document)
    if not grids:
        output.note("note: no tensor is in a numbered layer, so there is no picture")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(f"Differences to {document['reference']}", grids, path)
    except OSError as error:
        raise WriteError(f"the picture cannot be written: {error.strerror or error}", where=str(path)) from error
    output.note(f"picture: {path}")


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
    spectral = "effective_ranks" in total
    columns += [Column("rank", "right")] if spectral else []
    rows = [
        (
            name,
            _number(entry["relative"]),
            _number(entry["difference"]),
            _number(entry["largest"]),
            _number(entry["cosine"]),
            f"{entry['tensors_equal']} of {entry['tensors']}",
            *([_number(total["effective_ranks"][place])] if spectral else []),
        )
        for place, (name, entry) in enumerate(zip(document["models"], total["models"], strict=True))
    ]
    output.table(columns, rows)
    if len(document["models"]) > 1:
        output.heading("Cosines of the differences")
        cosines = [
            (name, *map(_number, row)) for name, row in zip(document["models"], total["delta_cosines"], strict=True)
        ]
        output.table([Column(""), *(Column(name, "right") for name in document["models"])], cosines)
        output.text(f"sign conflicts: {_share(total['sign_conflicts'])} of the changed elements")
        if spectral:
            output.heading("How far each difference (row) lies within the subspace of another (column)")
            aligned = [
                (name, *map(_number, row)) for name, row in zip(document["models"], total["alignments"], strict=True)
            ]
            output.table([Column(""), *(Column(name, "right") for name in document["models"])], aligned)


def _show_tensors(document: dict[str, Any], limit: int, output: Output) -> None:
    from mergekit_px.inspection.compare_spectra import mean_alignment

    several = len(document["models"]) > 1
    spectral = "effective_ranks" in document["total"]
    columns = [Column("tensor")]
    for name in document["models"]:
        prefix = f"{name}: " if several else ""
        columns += [Column(f"{prefix}relative", "right"), Column(f"{prefix}largest", "right", essential=False)]
        columns += [Column(f"{prefix}cosine", "right", essential=not several)]
        columns += [Column(f"{prefix}rank", "right")] if spectral else []
    columns += [Column("conflicts", "right")] if several else []
    columns += [Column("aligned", "right")] if several and spectral else []
    shown = document["tensors"][: limit or None]
    rows = []
    for row in shown:
        cells = [row["name"]]
        for place, entry in enumerate(row["models"]):
            relative = "equal" if entry["identical"] else _number(entry["relative"])
            cells += [relative, _number(entry["largest"]), _number(entry["cosine"])]
            if spectral:
                ranks = row["effective_ranks"]
                cells.append("-" if ranks is None else _number(ranks[place]))
        cells += [_share(row["sign_conflicts"])] if several else []
        cells += [_number(mean_alignment(row["alignments"]))] if several and spectral else []
        rows.append(cells)
    output.heading("By tensor")
    output.table(columns, rows)
    left = len(document["tensors"]) - len(shown)
    if left:
        output.text(f"and {left} more (all with --limit 0)")


def _show_rest(document: dict[str, Any], limit: int, output: Output) -> None:
    missing = [f"not in {', '.join(entry['not_in'])}: {entry['name']}" for entry in document["missing"]]
    mismatched = [
        f"shapes differ: {entry['name']}: {' and '.join(map(str, entry['shapes']))}" for entry in document["mismatched"]
    ]
    for lines in (missing, mismatched):
        for line in lines[: limit or None]:
            output.text(line)
        if limit and len(lines) > limit:
            output.text(f"and {len(lines) - limit} more (all with --limit 0)")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
