"""``pxmerge stats``: what ``fisher`` and ``regmean`` need to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import (
    AllowCode,
    Device,
    Factory,
    LabelledData,
    PassSize,
    Precision,
    TextColumns,
    resumable,
    told,
)
from mergekit_px.cli._options import AllowPickle, Json, Quiet, run_mode
from mergekit_px.cli._output import output_for
from mergekit_px.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .safetensors file or a model of the Hub.")]
File = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--what", metavar="KIND...", help="fisher, gram, or both.  [default: both]"),
    Several("--what"),
]
Labels = Annotated[
    Literal["expected", "sampled", "given"],
    typer.Option("--labels", help="Of Fisher information: all classes, one drawn from the prediction, the data's."),
]
Count = Annotated[
    int | None, typer.Option("--examples", metavar="N", min=2, help="Use so many examples.  [default: all]")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Draws examples and labels.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run that was to write the file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]


def stats(
    model: Model,
    data: LabelledData,
    output: File,
    text: TextColumns,
    what: Kinds = None,
    labels: Labels = "expected",
    examples: Count = None,
    batch: PassSize = 64,
    seed: Seed = 0,
    factory: Factory = None,
    allow_code: AllowCode = False,
    precision: Precision = "float32",
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure Fisher information and Gram matrices of a model on data.

    The file goes to the methods fisher and regmean, after the models and in their order. A report with hashes, seed
    and sums stands beside it with the suffix .json.

    \b
    Examples:
      pxmerge stats ./math --data math.npz -o math-statistics.safetensors
      pxmerge stats ./math --data math.jsonl -o math-statistics.safetensors --what fisher --labels sampled
      pxmerge fisher --sources ./math ./code math-statistics.safetensors code-statistics.safetensors
    """
    mode = run_mode(resume=resume, overwrite=overwrite)
    kinds = tuple(dict.fromkeys(what or ("fisher", "gram")))
    if unknown := [kind for kind in kinds if kind not in ("fisher", "gram")]:
        raise UsageError(f"there are no statistics '{unknown[0]}'", where="--what", hint="give fisher, gram or both")
    from mergekit_px.learn.stats import StatsOptions, measure

    sink = output_for(json=json, quiet=quiet)
    options = StatsOptions(
        kinds=kinds,  # type: ignore[arg-type]
        labels=labels,
        examples=examples,
        batch=batch,
        seed=seed,
        precision=precision,
        device=device,
        text=text.options(),
        mode=mode,
        factory=factory,
        allow_code=allow_code,
        allow_pickle=allow_pickle,
    )
    with resumable():
        report = measure(model, data, output, options, told(sink), sink.note)
    if report["without"]:
        sink.warning(f"{len(report['without'])} tensors have no statistics: the model keeps them in another form")
    sink.document({"output": str(output), **report})
    sink.text(str(output))
    return 0
