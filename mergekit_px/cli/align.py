"""``pxmerge align``: a task vector of one model for another of the same architecture, or nearly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import (
    DATA_HELP,
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

TargetBase = Annotated[str, typer.Option("--target-base", metavar="MODEL", help="The model that receives.")]
DataFile = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help=f"{DATA_HELP}: a few labelled examples of the task; needed unless nothing is learned from them.",
    ),
]
Maps = Annotated[
    str | None,
    typer.Option(
        "--maps", metavar="FILE", help="What a former run transported with, or its folder; nothing is learned."
    ),
]
SourceBase = Annotated[
    str | None, typer.Option("--source-base", metavar="MODEL", help="The model that the fine-tune began with.")
]
SourceModel = Annotated[
    str | None, typer.Option("--source-model", metavar="MODEL", help="The fine-tune whose change is transported; or:")
]
TaskVector = Annotated[
    str | None,
    typer.Option("--task-vector", metavar="FILE", help="The change itself, as `pxmerge subtract` writes it."),
]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where results and report go.")]
TestData = Annotated[
    str | None, typer.Option("--test-data", metavar="FILE", help="Examples for the report.  [default: part of --data]")
]
Code = Annotated[
    str | None,
    typer.Option("--model", metavar="FILE.PY:FUNCTION", help="What makes the target, if config.json names no class."),
]
SourceCode = Annotated[
    str | None,
    typer.Option("--source-code", metavar="FILE.PY:FUNCTION", help="The same for the source, where it differs."),
]
Route = Annotated[
    Literal["orthogonal", "theseus", "gradfix", "permutation"],
    typer.Option(
        "--route",
        help="Rotations learned from labels, maps between activations, signs of gradients, or permutations found from"
        " the weights of both bases, without data.",
    ),
]
Parametrisation = Annotated[
    Literal["soft", "cayley", "polar"],
    typer.Option("--param", help="Free matrices with a penalty, exactly orthogonal ones, or projected in each step."),
]
Sided = Annotated[Literal["one", "two"], typer.Option("--sided", help="One matrix on both sides, or one on each.")]
Sites = Annotated[Literal["attention", "all"], typer.Option("--sites", help="Which linear layers are rotated.")]
Scale = Annotated[float, typer.Option("--scale", metavar="X", help="Factor of the transported task vector.")]
Beta = Annotated[
    float, typer.Option("--orthogonality", metavar="X", min=0, help="Factor of the penalty of soft matrices.")
]
Project = Annotated[bool, typer.Option("--project", help="Make soft matrices orthogonal when they are learned.")]
Vote = Annotated[
    bool, typer.Option("--majority/--mean-gradient", help="gradfix: signs by a vote of examples, or by their mean.")
]
Sham = Annotated[
    Literal["gauss", "rotated"],
    typer.Option("--sham", help="The random task vector beside the real one: equal norms, or equal spectra too."),
]
Scales = Annotated[
    list[float] | None,
    typer.Option("--scales", metavar="X...", help="Factors that the report tries.  [default: 0 to 2 by quarters]"),
    Several("--scales", "numbers"),
]
Permute = Annotated[
    list[str] | None,
    typer.Option("--permute", metavar="WHAT...", help="permutation: heads, mlp, residual.  [default: all of them]"),
    Several("--permute"),
]
Match = Annotated[
    Literal["spectrum", "product"],
    typer.Option("--match", help="permutation: heads by singular values, or by inner products (Git Re-Basin)."),
]
Inside = Annotated[
    Literal["joint", "separate"],
    typer.Option("--inside", help="permutation: one order of the channels of a head, or another for its values."),
]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="permutation: at most, until all is stable.")]
HeadNumber = Annotated[
    int | None, typer.Option("--heads", metavar="N", min=1, help="Attention heads.  [default: as config.json says]")
]
KvHeadNumber = Annotated[
    int | None,
    typer.Option("--kv-heads", metavar="N", min=1, help="Key and value heads.  [default: as config or shapes say]"),
]
PositionKind = Annotated[
    Literal["auto", "additive", "rotary"],
    typer.Option("--positions", help="How it knows positions: added to its inputs (or not at all), or rotary."),
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--place",
        metavar="ROLE=NAME...",
        help="permutation: what tensors are, by the ends of their names, as query=to_q; roles: docs/learn-align.md.",
    ),
    Several("--place", "assignments"),
]
Rate = Annotated[float, typer.Option("--learning-rate", metavar="X", help="Of the matrices; > 0.")]
TuneRate = Annotated[float, typer.Option("--tune-rate", metavar="X", help="Of the fine-tunes beside it; > 0.")]
Decay = Annotated[float, typer.Option("--weight-decay", metavar="X", min=0, help="Of AdamW.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=0, help="Of training, each time.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the split, the order and the sham.")]
Controls = Annotated[
    Literal["none", "cheap", "all"],
    typer.Option("--controls", help="What the result is compared with: nothing, what trains nothing, or all."),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the Python functions of --model and --source-code.")]


def align(
    target_base: TargetBase,
    text: TextColumns,
    data: DataFile = None,
    source_base: SourceBase = None,
    source_model: SourceModel = None,
    task_vector: TaskVector = None,
    output: Folder = Path("aligned"),
    test_data: TestData = None,
    maps: Maps = None,
    model: Code = None,
    source_code: SourceCode = None,
    route: Route = "orthogonal",
    param: Parametrisation = "soft",
    sided: Sided = "one",
    sites: Sites = "attention",
    scale: Scale = 1.0,
    orthogonality: Beta = 1.0,
    project: Project = False,
    majority: Vote = True,
    sham: Sham = "gauss",
    controls: Controls = "all",
    scales: Scales = None,
    permute: Permute = None,
    match: Match = "spectrum",
    inside: Inside = "joint",
    rounds: Rounds = 100,
    heads: HeadNumber = None,
    kv_heads: KvHeadNumber = None,
    positions: PositionKind = "auto",
    place: Places = None,
    learning_rate: Rate = 3e-3,
    tune_rate: TuneRate = 5e-4,
    weight_decay: Decay = 0.0,
    precision: Precision = "float32",
    steps: Steps = 150,
    batch: StepSize = 64,
    evaluate_every: Every = 10,
    validation: ValidationShare = 0.2,
    test: TestShare = 0.3,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Transport a task vector to another model, by rotations learned from a few examples (arXiv 2505.12021).

    The result is a task vector for the target base, the model that it makes, the rotations or permutations, and a
    report that holds the controls: the target without it, the task vector as it is, a random one of the same
    norms, and few-shot fine-tunes on the same examples. Read it before the model: where two models are unrelated,
    rotations are only another way to fine-tune.

    \b
    Examples:
      pxmerge align --source-base ./a --source-model ./a-ft --target-base ./b --data few.npz -o aligned
      pxmerge align --task-vector ./tau --target-base ./b --data few.npz --route gradfix
      pxmerge align --source-base ./a --source-model ./a-ft --target-base ./b --route permutation
      pxmerge align --task-vector ./tau2 --target-base ./b --maps ./aligned -o other
    """
    from mergekit_px.learn.align import AlignOptions, AlignSettings, align_task_vector
    from mergekit_px.learn.align.settings import DEFAULT_SCALES, PERMUTED

    sink = output_for(json=json, quiet=quiet)
    settings = AlignSettings(
        route=route,
        parametrisation=param,
        sided=sided,
        sites=sites,
        scale=scale,
        orthogonality=orthogonality,
        project=project,
        majority=majority,
        sham=sham,
        controls=controls,
        scales=DEFAULT_SCALES if scales is None else tuple(scales),
        learning_rate=learning_rate,
        tune_rate=tune_rate,
        weight_decay=weight_decay,
        precision=precision,
        steps=steps,
        batch=batch,
        evaluate_every=evaluate_every,
        validation=validation,
        test=test,
        seed=seed,
        permute=PERMUTED if permute is None else tuple(sorted(set(permute))),
        match=match,
        inside=inside,
        rounds=rounds,
        heads=heads,
        kv_heads=kv_heads,
        positions=positions,
        places=tuple(_place(one) for one in place or ()),
    )
    options = AlignOptions(
        target_base=target_base,
        data=data,
        text=text.options(),
        source_base=source_base,
        source_model=source_model,
        task_vector=task_vector,
        output=output,
        test_data=test_data,
        maps=maps,
        model=model,
        source_code=source_code,
        settings=settings,
        device=device,
        mode=run_mode(resume=resume, overwrite=overwrite),
        allow_code=allow_code,
        allow_pickle=allow_pickle,
    )
    with resumable():
        aligned = align_task_vector(options, sink.note)
    _report(aligned.report, sink)
    sink.text(str(aligned.output))
    return 0


def _report(report: Mapping[str, Any], sink: Output) -> None:
    sink.document(report)
    scores = report["test"]
    if scores:
        columns = [Column("on test data"), Column("accuracy", "right")]
        sink.table(columns, [(name, f"{accuracy:.1f}") for name, accuracy in scores.items()])
    rotations = report.get("rotations")
    if rotations is not None:
        sink.note(
            f"{rotations['matrices']} matrices, orthogonal to {rotations['orthogonality_error']:.2g}, mean distance"
            f" from the identity {rotations['mean_distance_from_identity']:.2g}"
        )
        if rotations["stay"]:
            named = ", ".join(rotations["stay"][:3]) + (", ..." if len(rotations["stay"]) > 3 else "")
            sink.note(f"{len(rotations['stay'])} matrices are added as they are: {named}")
    permutations = report.get("permutations")
    if permutations is not None:
        _about(permutations, sink)
    if not scores:
        sink.note(f"not scored, since there is no --data: {', '.join(report['not_scored'])}")
    elif scores["aligned"] <= max((scores[name] for name in ("naive", "sham") if name in scores), default=-1.0):
        sink.warning("alignment gains nothing over the task vector as it is, or over a random one of the same norms")
    if report["left_out"]:
        sink.note(f"{len(report['left_out'])} tensors of the task vector have no place in the target")
    tested = f"; {report['examples']['test']} test examples" if scores else ""
    sink.note(f"{show_seconds(report['seconds'])}{tested}")


def _about(permutations: Mapping[str, Any], sink: Output) -> None:
    likeness = permutations["similarity"]
    sink.note(
        f"{permutations['moved']:.0%} of all places have another unit than before; cosine of the weights"
        f" {likeness['before']:.3f}, then {likeness['after']:.3f}; rounds: {permutations['rounds']}"
    )
    if not permutations["stable"]:
        sink.warning("the matching had not settled when it was stopped; give it more --rounds")
    for block, reason in permutations["left_alone"].items():
        sink.note(f"{block.rstrip('.') or 'the model'} keeps its order: {reason}")


def _place(text: str) -> tuple[str, str]:
    role, equals, pattern = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} names no role", hint="write --place ROLE=NAME, as in --place query=to_q")
    return role, pattern
