"""``pxmerge adapter inspect``: what an adapter holds."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_px.cli._documents import AdapterDocument
from mergekit_px.cli._options import AllowPickle, Json
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._units import show_count
from mergekit_px.cli.adapter_inputs import AdapterOptions, AdapterPath, find_model

if TYPE_CHECKING:
    from mergekit_px.adapters.describe import AdapterSummary

FitsOn = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Also check that it fits this model.")]
Pattern = Annotated[str, typer.Option("--modules", metavar="GLOB", help="Only modules of such names.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Rows of the table; 0 for all.")]
NoNorms = Annotated[bool, typer.Option("--no-norms", help="Read headers only, no numbers.")]


def inspect(
    adapter: AdapterPath,
    binding: AdapterOptions,
    base: FitsOn = None,
    modules: Pattern = "*",
    limit: Limit = 20,
    no_norms: NoNorms = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> int:
    """Show what an adapter holds: its kind, targets, ranks, scales, and the norm of the update of each module.

    The norm is that of the whole update, its scale within, found from the factors alone. It is left out for kinds
    whose update depends on the base. With --base the adapter is also held against a model, and what clashes first is
    an error; that reads headers only.

    \b
    Examples:
      pxmerge adapter inspect ./math-lora
      pxmerge adapter inspect style.safetensors --modules "*attn*" --limit 0
      pxmerge adapter inspect ./math-lora --base ./base --json
    """
    from mergekit_px.adapters.describe import describe_adapter

    output = output_for(json=json)
    from mergekit_px.plan.inputs import fetch_adapter

    opened = fetch_adapter(adapter, allow_pickle=allow_pickle)[0]
    summary = describe_adapter(opened, binding.bind_options(), norms=not no_norms)
    changed = None
    if base is not None:
        model = find_model(base, output, allow_pickle=allow_pickle)
        changed = sorted(opened.bind(model, binding.bind_options()))
    document = _document(summary, modules, base, changed)
    output.document(document, AdapterDocument)
    _show(document, limit, output)
    return 0


def _document(summary: AdapterSummary, pattern: str, base: str | None, changed: list[str] | None) -> dict[str, Any]:
    chosen = [module for module in summary.modules if fnmatchcase(module.name, pattern)]
    return {
        "adapter": summary.label,
        "kind": summary.kind,
        "base_model": summary.base_model_name,
        "parameters": summary.parameters,
        "targets": dict(Counter(module.name.rpartition(".")[2] for module in summary.modules)),
        "ranks": dict(sorted(Counter(m.rank for m in summary.modules if m.rank is not None).items())),
        "replaced": list(summary.whole),
        "token_rows": dict(summary.tokens),
        "refusal": summary.refusal,
        "fits": base,
        "changes": changed,
        "modules": [
            {
                "name": module.name,
                "rank": module.rank,
                "scale": module.scale,
                "norm": module.norm,
                "shapes": {role: list(shape) for role, shape in module.shapes.items()},
            }
            for module in chosen
        ],
    }


def _show(document: dict[str, Any], limit: int, output: Output) -> None:
    targets = ", ".join(f"{count} {name}" for name, count in document["targets"].items())
    ranks = ", ".join(f"{rank} in {count}" for rank, count in document["ranks"].items())
    tokens = ", ".join(f"{rows} of {path}" for path, rows in document["token_rows"].items())
    output.pairs(
        [
            ("adapter", document["adapter"]),
            ("kind", document["kind"]),
            ("base model", document["base_model"]),
            ("parameters", show_count(document["parameters"])),
            ("targets", targets or None),
            ("ranks", ranks or None),
            ("replaced whole", ", ".join(document["replaced"]) or None),
            ("token rows", tokens or None),
            ("cannot be merged", document["refusal"]),
            ("fits", document["fits"] and f"{document['fits']}: {len(document['changes'])} tensors change"),
        ]
    )
    shown = document["modules"][: limit or None]
    if not shown:
        return
    output.heading("Modules")
    columns = [Column("module"), Column("rank", "right"), Column("scale", "right"), Column("norm", "right")]
    output.table([*columns, Column("shapes", essential=False)], [_row(module) for module in shown])
    left = len(document["modules"]) - len(shown)
    if left and output.is_human:
        output.text(f"and {left} more (all with --limit 0)")


def _row(module: dict[str, Any]) -> tuple[object, ...]:
    shapes = ", ".join(f"{role} {' x '.join(map(str, shape))}" for role, shape in module["shapes"].items())
    numbers = (None if module[key] is None else f"{module[key]:.4g}" for key in ("scale", "norm"))
    return (module["name"], module["rank"], *numbers, shapes)
