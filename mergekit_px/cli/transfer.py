"""``pxmerge transfer``: knowledge from one model into another of a different architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import Device, Overwrite, Resume, resumable
from mergekit_px.cli._options import AllowPickle, Json, Quiet, run_mode
from mergekit_px.cli._output import Column, Output, output_for

if TYPE_CHECKING:
    from mergekit_px.learn.transfer.load import LoadedTransferPlan

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan: models, data, and which tensors are paired.")]
Folder = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="Where models and report go.  [default: the plan's]"),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Set keys of the plan, as in --set seeds=3."),
    Several("--set", "assignments"),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="The first seed.  [default: the plan's]")]
Seeds = Annotated[
    int | None, typer.Option("--seeds", metavar="N", min=1, help="Repeat under so many seeds.  [default: the plan's]")
]
Suggest = Annotated[bool, typer.Option("--suggest", help="List the tensors that can be paired, and stop.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the Python functions that the plan names.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Threads of one operation; 1 gives the same bytes every time."),
]


def transfer(
    plan: PlanFile,
    output: Folder = None,
    assignments: Assignments = None,
    suggest: Suggest = False,
    seed: Seed = None,
    seeds: Seeds = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train a model while another hands it knowledge (MergeNet, arXiv 2404.13322). Experimental.

    The two may differ in architecture and task: pairs of their matrices exchange low-rank factors through a small
    attention network, which learns along and is gone in the end. The results are ordinary checkpoints, and a report
    of the metric with transfer, without, and with a source of random numbers, paired over seeds. Gains are not
    promised: read the report before the model.

    The plan is described in docs/transfer.md.

    \b
    Examples:
      pxmerge transfer plan.yaml --suggest
      pxmerge transfer plan.yaml -o ./transfer --seeds 5
      pxmerge transfer plan.yaml --allow-code --set transfer.cycle=8
      pxmerge transfer plan.yaml --resume
    """
    from mergekit_px.learn.transfer.load import load_transfer_plan

    sink = output_for(json=json, quiet=quiet)
    loaded = load_transfer_plan(plan, overrides=assignments or (), complete=not suggest)
    if suggest:
        _suggest(loaded, sink, allow_code=allow_code, allow_pickle=allow_pickle)
        return 0
    from mergekit_px.learn.transfer.run import TransferOptions, run_transfers

    options = TransferOptions(
        output=output,
        seed=seed,
        seeds=seeds,
        device=device,
        threads=threads,
        mode=run_mode(resume=resume, overwrite=overwrite),
        allow_code=allow_code,
        allow_pickle=allow_pickle,
    )
    with resumable():
        outcome = run_transfers(loaded, options, sink.note)
    from mergekit_px.learn.transfer.report import explanation, table_rows

    titles, *rows = table_rows(outcome.report)
    sink.document(outcome.report)
    sink.table([Column(title) for title in titles], rows)
    sink.note(explanation(outcome.report))
    sink.text(str(outcome.output))
    return 0


def _suggest(loaded: LoadedTransferPlan, sink: Output, *, allow_code: bool, allow_pickle: bool) -> None:
    from mergekit_px.learn.transfer.suggest import as_document, suggestions

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
    sink.note("pair them under pairs: [{target: NAME, source: NAME}]; late layers are the ones to begin with")
