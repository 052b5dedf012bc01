"""``pxmerge tune``: singular values of a merged update, trained on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import (
    AllowCode,
    Device,
    Factory,
    LabelledData,
    Overwrite,
    Precision,
    Resume,
    StepSize,
    TextColumns,
    resumable,
)
from mergekit_px.cli._options import AllowPickle, Json, Quiet, run_mode
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.errors import UsageError

ComponentsFile = Annotated[str, typer.Argument(metavar="COMPONENTS", help="A .safetensors file of components.")]
Base = Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that the update was taken from.")]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where model, artefact and report go.")]
Top = Annotated[
    int | None,
    typer.Option("--top", metavar="N", min=1, help="Train the N largest values of each matrix.  [default: all]"),
]
Core = Annotated[bool, typer.Option("--core", help="Train a full N x N matrix between the vectors, not its diagonal.")]
Match = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="GLOB...", help="The matrices to train, by name.  [default: all]"),
    Several("--match"),
]
HeldOut = Annotated[
    str, typer.Option("--validation", metavar="SHARE|FILE", help="What values are chosen on: a share, or a file.")
]
Test = Annotated[
    str, typer.Option("--test", metavar="SHARE|FILE", help="What is reported and never chosen on; 0 for none.")
]
Epochs = Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="Passes over the training data.")]
Rate = Annotated[float, typer.Option("--rate", metavar="X", min=0.0, help="Learning rate at the start of the cosine.")]
Decay = Annotated[float, typer.Option("--decay", metavar="X", min=0.0, help="Weight decay, towards the base.")]
Clip = Annotated[float, typer.Option("--clip", metavar="X", min=0.0, help="Largest norm of a gradient.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Draws the parts of the data and their order.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Use a base that the update was not taken from.")
]


def tune(
    components: ComponentsFile,
    base: Base,
    data: LabelledData,
    text: TextColumns,
    output: Folder = Path("tuned"),
    top: Top = None,
    core: Core = False,
    match: Match = None,
    validation: HeldOut = "0.2",
    test: Test = "0.2",
    epochs: Epochs = 10,
    batch: StepSize = 128,
    rate: Rate = 0.1,
    decay: Decay = 0.1,
    clip: Clip = 1.0,
    seed: Seed = 0,
    precision: Precision = "float32",
    factory: Factory = None,
    allow_code: AllowCode = False,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_base_mismatch: AllowMismatch = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train the singular values of a merged update on labelled data (stage 2 of AXIS, arXiv 2508.19353).

    The vectors stay as they are, so a handful of numbers for each matrix is trained, at a cost that does not depend
    on how many models were merged. Values are chosen on validation data; the report has base, components as they
    came, and tuned ones side by side, on test data too.

    \b
    Examples:
      pxmerge tune components.safetensors --base ./base --data target.npz -o ./tuned
      pxmerge tune components.safetensors --base ./base --data target.jsonl --top 32 --core --overwrite
      pxmerge tune components.safetensors --base ./base --data target.npz -o ./tuned --resume
    """
    mode = run_mode(resume=resume, overwrite=overwrite)
    held_out = {"--validation": validation, "--test": test}
    shares = {flag: held_out_share(text, flag) for flag, text in held_out.items()}
    from mergekit_px.learn.tune.run import TuneOptions, run_tune
    from mergekit_px.learn.tune.training import Schedule

    sink = output_for(json=json, quiet=quiet)
    options = TuneOptions(
        top=top,
        core=core,
        match=tuple(match or ("*",)),
        validation=shares["--validation"],
        test=shares["--test"],
        text=text.options(),
        schedule=Schedule(epochs, batch, rate, decay, clip, seed, precision),
        device=device,
        mode=mode,
        factory=factory,
        allow_code=allow_code,
        allow_pickle=allow_pickle,
        allow_base_mismatch=allow_base_mismatch,
    )
    with resumable():
        report = run_tune(
            components,
            base,
            data,
            output,
            options,
            lambda step, steps, loss: sink.note(f"step {step} of {steps}: loss {loss:.4g}"),
            sink.note,
        )
    show_scores(report, sink)
    sink.document({"output": str(output), **report})
    sink.text(str(output))
    return 0


def held_out_share(text: str, flag: str) -> float | str:
    """A share in [0, 1), or the name of a file."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 <= share < 1:
        raise UsageError(f"a share is at least 0 and below 1, not {text}", where=flag)
    return share


def show_scores(report: dict[str, Any], sink: Output) -> None:
    """Loss and accuracy of what was tuned, beside the controls."""
    rows = [
        (what, part, *(f"{score[name]:.4g}" if name in score else None for name in ("accuracy", "loss")))
        for what, parts in report["scores"].items()
        for part, score in parts.items()
    ]
    sink.table([Column("model"), Column("data"), Column("accuracy, %", "right"), Column("loss", "right")], rows)
    sink.note(f"{report['trained_values']} values trained, chosen after step {report['selected_step']}")
