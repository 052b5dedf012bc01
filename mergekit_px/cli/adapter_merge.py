"""``pxmerge adapter merge``: several adapters into one, or into a base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._documents import MergedAdapterDocument
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli.adapter_apply import apply_adapters
from mergekit_px.cli.adapter_inputs import (
    AdapterOptions,
    AdapterPaths,
    factor_dtype,
    find_model,
    plain_numbers,
    require_new_file,
    require_new_folder,
)
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.adapters.merge import MergedAdapter

_FOR_AN_ADAPTER = {"output", "dtype", "overwrite", "allow_pickle", "json", "quiet"}
"""The run options that make sense where no model is written."""

Into = Annotated[
    str | None,
    typer.Option("--into", metavar="BASE", help="Put the merged adapter into this model, and write the model."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The model that updates depend on (DoRA, OFT, ...), or names."),
]
Method = Annotated[
    Literal[
        "linear", "cat", "svd", "ties", "dare-linear", "dare-ties", "magnitude-prune", "knots", "core", "ctm", "robust"
    ],
    typer.Option("--method", help="How they are merged."),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="N", min=1, help="Of the result.  [default: the largest; cat, linear: in full]"),
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="X...", help="One for each adapter.  [default: equal, adding to 1]"),
    Several("--weights", "numbers"),
]
Inner = Annotated[
    Literal["linear", "ties", "dare-linear", "dare-ties", "magnitude-prune"],
    typer.Option("--merger", help="The rule inside knots, core and ctm."),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="X", min=0, max=1, help="Share of the entries kept.  [default: 0.2, at random 0.5]"
    ),
]
Scope = Annotated[
    Literal["model", "tensor"] | None,
    typer.Option("--scope", help="Where the largest are sought.  [default: model; core, ctm: tensor]"),
]
DivideBy = Annotated[
    Literal["weights", "count", "nothing"], typer.Option("--divide-by", help="What ties divides its sums by.")
]
Scale = Annotated[float, typer.Option("--scale", metavar="X", help="What the result is multiplied by.")]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Damp the directions that many adapters share first (Pico).")
]
Balance = Annotated[float, typer.Option("--balance", metavar="X", help="Of ctm: beta.")]
Isotropic = Annotated[bool, typer.Option("--isotropic", help="Of core: make the singular values equal.")]
To = Annotated[
    Literal["peft", "kohya", "diffusers"] | None,
    typer.Option("--to", help="The format to write.  [default: that of the adapters, else peft]"),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the random methods.")]


def merge(
    adapters: AdapterPaths,
    binding: AdapterOptions,
    options: RunOptions,
    method: Method = "svd",
    rank: Rank = None,
    weights: Weights = None,
    merger: Inner = "ties",
    density: Density = None,
    scope: Scope = None,
    divide_by: DivideBy = "weights",
    scale: Scale = 1.0,
    calibrate: Calibrate = False,
    balance: Balance = 0.0,
    isotropic: Isotropic = False,
    seed: Seed = 0,
    to: To = None,
    base: BaseModel = None,
    into: Into = None,
) -> int:
    """Merge adapters into one of a chosen rank. All methods but robust work on the updates dW, whatever the ranks.

    linear: the weighted sum. cat: the same as stacked factors. svd: the nearest of the rank to the sum, without ever
    forming dW. ties, dare-linear, dare-ties, magnitude-prune: on dW, then the nearest of the rank. knots, core, ctm:
    a rule in common coordinates. robust: on the factors. How much of the merged updates the rank holds is reported.

    Kohya's and diffusers' files give such a file again, every part of the pipeline with its own names; adapters of
    mixed formats give a PEFT folder. In a folder the file is called pytorch_lora_weights.safetensors.

    With --into the merged adapter is written to DIR-adapter and the model with it to DIR. Without a limit of rank,
    the methods for models take adapters too: pxmerge ties --base BASE --sources ADAPTER...

    \b
    Examples:
      pxmerge adapter merge ./math-lora ./code-lora --weights 0.6 0.4 --rank 16 -o ./both-lora
      pxmerge adapter merge ./math-lora ./code-lora --method knots --merger ties --density 0.3
      pxmerge adapter merge ./math-lora ./code-lora --method core --calibrate --into ./base -o ./both
    """
    from mergekit_px.adapters.merge import common_format, merge_adapters
    from mergekit_px.adapters.merge_options import MergeOptions
    from mergekit_px.adapters.remarks import remarks
    from mergekit_px.adapters.save import LORA_FILE
    from mergekit_px.checkpoint.publish import new_folder
    from mergekit_px.checkpoint.ranged import check_unchanged

    _check(options, into, base)
    given = plain_numbers(weights, len(adapters), "adapters")
    dtype = "float32" if into is not None else None if options.dtype is None else factor_dtype(options.dtype)
    settings = MergeOptions(
        method=method.replace("-", "_"),  # type: ignore[arg-type]
        weights=given,
        rank=rank,
        merger=merger.replace("-", "_"),
        density=density,
        scope=scope,
        divide_by=divide_by,
        scale=scale,
        calibrate=calibrate,
        balance=balance,
        isotropic=isotropic,
        seed=seed,
        dtype=dtype,
    )
    if unused := settings.without_effect():
        rule = f" with --merger {merger}" if method in ("knots", "core", "ctm") else ""
        raise UsageError(
            f"--{unused[0].replace('_', '-')} has no effect on {method}{rule}",
            hint="leave it out, or take another method",
        )
    output = options.output or Path("merged")
    replace = options.mode != "new"
    if into is not None and to not in (None, "peft"):
        raise UsageError(f"--to {to} has no effect with --into", hint="leave it out")
    is_file = into is None and output.suffix == ".safetensors"
    if is_file and to == "peft":
        raise UsageError("a PEFT adapter is a folder", where=str(output), hint="give a name without .safetensors")
    folder = output if into is None else output.with_name(f"{output.name}-adapter")
    inputs = [*adapters, *(model for model in (into, base) if model is not None)]
    if is_file:
        require_new_file(output, overwrite=replace, inputs=inputs)
    else:
        for place in {output, folder}:
            require_new_folder(place, overwrite=replace, inputs=inputs)
    sink = output_for(json=options.json, quiet=options.quiet, writes=True)
    from mergekit_px.plan.inputs import fetch_adapter

    opened = [fetch_adapter(adapter, allow_pickle=options.allow_pickle)[0] for adapter in adapters]
    written = to or ("peft" if into is not None else common_format(opened))
    if is_file and written == "peft":
        raise UsageError(
            "these adapters become a PEFT folder", where=str(output), hint="give a folder, or --to kohya or diffusers"
        )
    model = into or base
    checkpoint = None if model is None else find_model(model, sink, allow_pickle=options.allow_pickle)
    merged = merge_adapters(opened, settings, base=checkpoint, binding=binding.bind_options())
    check_unchanged([*(adapter.checkpoint for adapter in opened), *([checkpoint] if checkpoint else [])])
    if len(merged.base_models) > 1:
        sink.warning(
            f"the adapters are for different bases ({', '.join(merged.base_models)}); the merged one names none"
        )
    if len(merged.task_types) > 1:
        sink.warning(
            f"the adapters are for different tasks ({', '.join(merged.task_types)}); the merged one names none"
        )
    for adapter in opened:
        for remark in remarks(adapter):
            sink.warning(remark)
    if not any(report.norm for report in merged.reports):
        sink.warning("the merged adapter changes nothing, for each of its updates is zero")
    if is_file or written == "peft":
        merged.save(output if is_file else folder, to=written, overwrite=replace)
    else:
        with new_folder(output, overwrite=replace) as staged:
            merged.save(staged / LORA_FILE, to=written)
    if into is not None:
        sink.note(_summary(merged))
        # the other choices are in the merged adapter
        return apply_adapters(into, [str(folder)], AdapterOptions(keep_tied=binding.keep_tied), options)
    document = _document(merged, adapters, given)
    _show(document, _summary(merged), sink)
    sink.document({"output": str(folder), "format": written, "method": method, **document}, MergedAdapterDocument)
    sink.text(str(folder))
    return 0


def _check(options: RunOptions, into: str | None, base: str | None) -> None:
    """Raises ``UsageError`` for options that the kind of result does not have."""
    if into is not None:
        if base is not None:
            raise UsageError("--into names the base already", hint="leave --base out")
        if options.dry_run:
            raise UsageError(
                "there is no plan before the adapters are merged",
                where="--dry-run",
                hint="leave --into out, then give --dry-run to `pxmerge adapter apply`",
            )
        return
    for field in dataclasses.fields(options):
        if field.name not in _FOR_AN_ADAPTER and getattr(options, field.name) != field.default:
            flag = "--set" if field.name == "assignments" else f"--{field.name.replace('_', '-')}"
            raise UsageError(
                f"{flag} is for models, and an adapter is written", hint="add --into BASE, or leave it out"
            )


def _document(merged: MergedAdapter, labels: list[str], weights: list[float] | None) -> dict[str, Any]:
    energies = [report.norm**2 for report in merged.reports]
    total = sum(energies)
    shares = weights or [1 / len(labels)] * len(labels)
    cosines = [
        sum(report.cosines[index] * energy for report, energy in zip(merged.reports, energies, strict=True))
        for index in range(len(labels))
    ]
    return {
        "captured_energy": merged.captured_energy,
        "base_model": merged.base_model_name,
        "adapters": [
            {"adapter": label, "weight": weight, "cosine": cosine / total if total else 0.0}
            for label, weight, cosine in zip(labels, shares, cosines, strict=True)
        ],
        "modules": [
            {
                "name": report.name,
                "rank": report.rank,
                "captured_energy": report.captured_energy,
                "norm": report.norm,
                "cosines": list(report.cosines),
            }
            for report in merged.reports
        ],
    }


def _summary(merged: MergedAdapter) -> str:
    ranks = sorted({report.rank for report in merged.reports})
    between = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    least = min(merged.reports, key=lambda report: report.captured_energy)
    worst = "" if least.captured_energy > 0.9999 else f", least {least.captured_energy:.2%} in {least.name}"
    return f"{len(merged.reports)} modules of {between} hold {merged.captured_energy:.2%} of the energy{worst}"


def _show(document: dict[str, Any], summary: str, sink: Output) -> None:
    sink.table(
        [Column("adapter"), Column("weight", "right"), Column("cosine with the result", "right")],
        [(row["adapter"], f"{row['weight']:.4g}", f"{row['cosine']:.4f}") for row in document["adapters"]],
    )
    sink.note(summary)
