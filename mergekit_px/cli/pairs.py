"""``pxmerge pairs``: the tensors that the models of a transfer can pair."""

from __future__ import annotations

from typing import Annotated

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, output_for

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan that names the models; pairs may be missing.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Set keys of the plan."),
    Several("--set", "assignments"),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the Python functions that the plan names.")]


def pairs(
    plan: PlanFile,
    assignments: Assignments = None,
    allow_code: AllowCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """List the tensors that `pxmerge transfer` can pair, as the matrices that they count as.

    Late layers are the ones to begin with.

    \b
    Examples:
      pxmerge pairs plan.yaml
      pxmerge pairs plan.yaml --json
    """
    from mergekit_px.learn.transfer.load import load_transfer_plan
    from mergekit_px.learn.transfer.suggest import as_document, suggestions

    sink = output_for(json=json, quiet=quiet)
    loaded = load_transfer_plan(plan, overrides=assignments or (), complete=False)
    found = suggestions(loaded.plan, allow_code=allow_code, allow_pickle=allow_pickle)
    sink.document(as_document(found))
    columns = [Column("tensor"), Column("shape", "right"), Column("as a matrix", "right"), Column("rank", "right")]
    for name, candidates in found.items():
        sink.heading(name)
        rows = [
            (one.name, " x ".join(map(str, one.shape)), " x ".join(map(str, one.matrix)), one.rank)
            for one in candidates
        ]
        sink.table(columns, rows)
    sink.note("pair them under pairs: [{target: NAME, source: NAME}]")
    return 0
