"""``pxmerge ofasd``: coefficients for task vectors, learned from a little data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import (
    DATA_HELP,
    AllowCode,
    Device,
    Every,
    Overwrite,
    Precision,
    Resume,
    StepSize,
    TestShare,
    TextColumns,
    ValidationShare,
    resumable,
)
from mergekit_px.cli._options import AllowPickle, Json, Quiet, run_mode
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._units import show_seconds
from mergekit_px.errors import UsageError

QUIET_SECONDS = 10.0
"""A run tells how far it is after so long without a line."""

Base = Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that all clients began with.")]
Clients = Annotated[
    list[str],
    typer.Option("--clients", metavar="MODEL...", help="The fine-tunes of the base, or task vectors taken from it."),
    Several("--clients"),
]
DataFile = Annotated[
    str,
    typer.Option("--data", metavar="FILE", help=f"{DATA_HELP}; labels may be left out where the objective needs none."),
]
Control = Annotated[
    str | None,
    typer.Option("--control-data", metavar="FILE", help="Labelled examples that must stay known (negation)."),
]
Counts = Annotated[
    list[str] | None,
    typer.Option("--counts", metavar="N...", help="Examples that each client learned from: its share at first."),
    Several("--counts", "numbers"),
]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where coefficients and report go.")]
Code = Annotated[
    str | None,
    typer.Option("--model", metavar="FILE.PY:FUNCTION", help="What makes the model, if config.json names no class."),
]
Objective = Annotated[
    Literal["distill", "cross-entropy", "entropy", "negation"],
    typer.Option("--objective", help="What is learned by: the clients' ensemble, labels, certainty, unfitting labels."),
]
Granularity = Annotated[
    Literal["tensor", "layer", "model", "groups", "random"],
    typer.Option("--granularity", help="What has a coefficient of its own for each client."),
]
Groups = Annotated[
    list[str] | None,
    typer.Option("--groups", metavar="REGEX...", help="With --granularity groups: patterns of tensor names."),
    Several("--groups"),
]
RandomGroups = Annotated[
    int, typer.Option("--random-groups", metavar="K", min=1, help="With --granularity random: parts of each matrix.")
]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", help="Of the distillation; > 0.")]
LabelShare = Annotated[
    float | None,
    typer.Option("--label-share", metavar="X", min=0, max=1, help="Share of the labels in the loss.  [default: 0.5]"),
]
Ensemble = Annotated[
    Literal["logits", "probabilities"], typer.Option("--teacher", help="What of the clients is averaged.")
]
Penalty = Annotated[
    float, typer.Option("--penalty", metavar="X", min=0, help="Factor of the distance from the first coefficients.")
]
PenaltyNorm = Annotated[int, typer.Option("--penalty-norm", metavar="P", min=1, max=2, help="1 or 2.")]
Initial = Annotated[
    float | None,
    typer.Option("--initial", metavar="X", help="First value of all coefficients.  [default: by the objective]"),
]
Bounds = Annotated[
    list[str] | None,
    typer.Option("--bounds", metavar="LOW HIGH", help="Least and largest coefficient.  [entropy: 0 1]"),
    Several("--bounds", "numbers"),
]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", metavar="X", help="Of AdamW.  [default: by the objective]")
]
Decay = Annotated[
    float | None, typer.Option("--weight-decay", metavar="X", min=0, help="Of AdamW.  [default: by the objective]")
]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=0, help="Most steps.  [default: 300; entropy: 500]")
]
Patience = Annotated[
    int, typer.Option("--patience", metavar="N", min=1, help="Validations without gain until the end.")
]
Norms = Annotated[
    Literal["reestimate", "mean"],
    typer.Option("--batch-norm", help="Running statistics: estimated anew on the data, or the clients' mean."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the split, the order and random groups.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read task vectors from their files in every step; memory for one at a time.")
]
Compare = Annotated[bool, typer.Option("--compare/--no-compare", help="Also learn one coefficient for each client.")]


def ofasd(
    base: Base,
    clients: Clients,
    data: DataFile,
    text: TextColumns,
    output: Folder = Path("coefficients"),
    control_data: Control = None,
    counts: Counts = None,
    model: Code = None,
    objective: Objective = "distill",
    granularity: Granularity = "tensor",
    groups: Groups = None,
    random_groups: RandomGroups = 1,
    temperature: Temperature = 1.0,
    label_share: LabelShare = None,
    teacher: Ensemble = "logits",
    penalty: Penalty = 0.0,
    penalty_norm: PenaltyNorm = 2,
    initial: Initial = None,
    bounds: Bounds = None,
    learning_rate: Rate = None,
    weight_decay: Decay = None,
    steps: Steps = None,
    batch: StepSize = 128,
    evaluate_every: Every = 20,
    patience: Patience = 10,
    batch_norm: Norms = "reestimate",
    precision: Precision = "float32",
    validation: ValidationShare = 0.2,
    test: TestShare = 0.2,
    seed: Seed = 0,
    stream: Stream = False,
    compare: Compare = True,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Learn a coefficient for each client and block of parameters, by distilling the clients' ensemble (OFASD).

    The result is a small file of coefficients, a recipe that applies it, and a report: scores on held-out data beside
    those of the base, the plain average, one coefficient for each client, and the ensemble itself. Other objectives
    learn from labels (aTLAS, arXiv 2407.02880), from certainty (AdaMerging, arXiv 2310.02575), or unlearn.

    What is reconstructed rather than published is said in docs/learn-ofasd.md.

    \b
    Examples:
      pxmerge ofasd --base ./base --clients ./a ./b ./c --data proxy.jsonl -o coefficients
      pxmerge run coefficients/recipe.yaml -o ./merged
    """
    from mergekit_px.learn.ofasd import OfasdOptions, Settings, learn_coefficients

    sink = output_for(json=json, quiet=quiet)
    settings = Settings(
        objective=objective,
        granularity=granularity,
        groups=tuple(groups or ()),
        random_groups=random_groups,
        temperature=temperature,
        label_share=label_share,
        teacher=teacher,
        penalty=penalty,
        penalty_norm=penalty_norm,
        initial=initial,
        bounds=_bounds(bounds),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        steps=steps,
        batch=batch,
        evaluate_every=evaluate_every,
        patience=patience,
        batch_norm=batch_norm,
        precision=precision,
        validation=validation,
        test=test,
        seed=seed,
    )
    options = OfasdOptions(
        base=base,
        sources=clients,
        data=data,
        text=text.options(),
        output=output,
        control=control_data,
        counts=None if counts is None else [_number(word, "--counts") for word in counts],
        model=model,
        settings=settings,
        stream=stream,
        compare=compare,
        device=device,
        mode=run_mode(resume=resume, overwrite=overwrite),
        allow_code=allow_code,
        allow_pickle=allow_pickle,
    )
    with resumable():
        learned = learn_coefficients(options, sink.note, _Teller(sink).tell)
    _report(learned.report, sink)
    sink.note(f"to apply them: pxmerge run {learned.output}/recipe.yaml")
    sink.text(str(learned.output))
    return 0


class _Teller:
    """Says how far learning is, now and then."""

    def __init__(self, sink: Output) -> None:
        self._sink = sink
        self._told = time.monotonic()

    def tell(self, step: int, loss: float) -> None:
        if time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
            self._sink.note(f"step {step}, loss {loss:.4g}")


def _report(report: Mapping[str, Any], sink: Output) -> None:
    sink.document(report)
    rows = dict(report["test"])
    if report["teacher"] is not None:
        rows["teacher"] = report["teacher"]
        for one in report["teacher"].get("sources", ()):
            rows[one["source"]] = one
    titles = list(dict.fromkeys(key for scores in report["test"].values() for key in scores))
    columns = [Column("on test data"), *(Column(title, "right") for title in titles)]
    sink.table(columns, [(name, *(_shown(scores.get(title)) for title in titles)) for name, scores in rows.items()])
    for warning in report["warnings"]:
        sink.warning(warning)
    sink.note(
        f"best after {report['best_step']} of {report['steps']} steps, {show_seconds(report['seconds'])};"
        f" {report['examples']['test']} test examples"
    )


def _shown(value: Any) -> str | None:
    return None if value is None else f"{value:.4g}"


def _bounds(words: list[str] | None) -> tuple[float, float] | None:
    if words is None:
        return None
    if len(words) != 2:
        raise UsageError(f"--bounds takes two numbers, {len(words)} are given")
    return _number(words[0], "--bounds"), _number(words[1], "--bounds")


def _number(word: str, flag: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"{flag}: '{word}' is not a number") from None
