"""``pxmerge adapter extract``: an adapter out of a fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.cli._arguments import Several
from mergekit_px.cli._documents import ExtractedAdapterDocument
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, output_for
from mergekit_px.cli.adapter_inputs import (
    BaseModel,
    Overwrite,
    check_format,
    factor_dtype,
    find_model,
    require_new_file,
    require_new_folder,
)
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mergekit_px.adapters.extract import ExtractedAdapter
    from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor

Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tune: folder, file or org/name@revision.")]
Target = Annotated[
    Path, typer.Option("-o", "--output", metavar="PATH", help="Where it is written: a folder for peft, else a file.")
]
To = Annotated[
    Literal["peft", "kohya", "diffusers"] | None,
    typer.Option("--to", help="The format to write.  [default: peft, or kohya for one file]"),
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="N", min=1, help="Rank of every module.  [default: 16]")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="X", help="Instead: the smallest rank that holds this share, as 0.95."),
]
MaxRank = Annotated[int | None, typer.Option("--max-rank", metavar="N", min=1, help="With --energy: no rank above.")]
ModuleRanks = Annotated[
    list[str] | None,
    typer.Option("--module-rank", metavar="GLOB=N...", help="Other ranks by tensor name; the last match counts."),
    Several("--module-rank", "assignments"),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB...", help="Only tensors of such names.  [default: all]"),
    Several("--include"),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB...", help="No tensors of such names."),
    Several("--exclude"),
]
Rest = Annotated[
    Literal["save", "drop", "error"] | None,
    typer.Option(
        "--rest",
        help="Changed tensors that have no low-rank form: saved whole, left out, refused."
        "  [default: save; error for one file]",
    ),
]
FactorType = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="Storage type of the factors.")]
BaseName = Annotated[
    str | None,
    typer.Option("--base-name", metavar="NAME", help="What the adapter calls its base.  [default: BASE as typed]"),
]


def extract(
    base: BaseModel,
    tuned: Tuned,
    output: Target = Path("adapter"),
    to: To = None,
    rank: Rank = None,
    energy: Energy = None,
    max_rank: MaxRank = None,
    module_rank: ModuleRanks = None,
    include: Include = None,
    exclude: Exclude = None,
    rest: Rest = None,
    dtype: FactorType = "float32",
    base_name: BaseName = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Extract a LoRA from a base and a fine-tune: the nearest one to TUNED - BASE, module by module.

    The base comes first here; `pxmerge subtract` takes the fine-tune first.

    Changed tensors without a low-rank form (norms, biases, a resized vocabulary) are saved whole. The result is a
    folder that PEFT loads, or one file for programs that read kohya's or diffusers' names. How much of each
    difference it holds is reported.

    \b
    Examples:
      pxmerge adapter extract ./base ./math -o ./math-lora --rank 32
      pxmerge adapter extract ./base ./math -o ./math-lora --energy 0.95 --max-rank 128
      pxmerge adapter extract ./base ./math --rank 8 --module-rank "*mlp*=32" --exclude "*embed*" "lm_head*"
      pxmerge adapter extract model.safetensors style.safetensors --to kohya -o style-lora.safetensors --rest drop
    """
    from mergekit_px.adapters.extract import ExtractOptions, extract_adapter
    from mergekit_px.checkpoint.ranged import check_unchanged
    from mergekit_px.plan.bases import swapped_note
    from mergekit_px.plan.inputs import ResolvedInput

    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy exclude each other", hint="give one of them")
    if max_rank is not None and energy is None:
        raise UsageError("--max-rank goes with --energy", hint="give a --rank")
    if module_rank and energy is not None:
        raise UsageError("--module-rank goes with --rank, not with --energy", hint="give one of them")
    ranks: int | dict[str, int] | None = None if energy is not None else rank or 16
    if module_rank:
        ranks = {"*": rank or 16} | dict(map(_module_rank, module_rank))
    to = check_format(to or ("kohya" if output.suffix == ".safetensors" else "peft"), output)
    if to != "peft" and rest == "save":
        raise UsageError(f"--rest save: a file of {to} holds factors alone", hint="give --rest drop, or write peft")
    rest = rest or ("save" if to == "peft" else "error")
    options = ExtractOptions(rank=ranks, energy=energy, max_rank=max_rank, rest=rest, dtype=factor_dtype(dtype))
    sink = output_for(json=json, quiet=quiet, writes=True)
    (require_new_folder if to == "peft" else require_new_file)(output, overwrite=overwrite, inputs=[base, tuned])
    if to != "peft" and base_name is not None:
        raise UsageError(f"--base-name has no place in a file of {to}", hint="leave it out")
    models = [find_model(model, sink, allow_pickle=allow_pickle) for model in (base, tuned)]
    inputs = [ResolvedInput(name, name, model) for name, model in zip((base, tuned), models, strict=True)]
    if (note := swapped_note(*inputs)) is not None:
        sink.warning(note)
    chosen = _chooser(include, exclude)
    _require_match(models[1], include, exclude)
    with closing(open_reader(models[0])) as old, closing(open_reader(models[1])) as new:

        def load(tensor: StoredTensor) -> torch.Tensor:
            """What was not chosen is read as the base's, and so has not changed."""
            if chosen(tensor.name):
                return read_tensor(new, tensor)
            return read_tensor(old, models[0].tensors[tensor.name])

        found = extract_adapter(models[0], models[1], options, load=load)
    if not found.modules and not found.whole:
        raise UsageError("nothing to extract: no chosen tensor differs", where=tuned, hint="compare the two models")
    check_unchanged(models)
    if to == "peft":
        found.save(output, base_model_name=base if base_name is None else base_name, overwrite=overwrite)
    else:
        found.save_file(output, to, overwrite=overwrite)
    document = _document(found)
    if found.dropped:
        sink.warning(f"changed but left out: {len(found.dropped)}, first {found.dropped[0]}")
    ranked = sorted(document["modules"], key=lambda row: row["captured_energy"])
    sink.table(
        [Column("module"), Column("rank", "right"), Column("energy", "right"), Column("norm", "right")],
        [(row["name"], row["rank"], f"{row['captured_energy']:.2%}", f"{row['norm']:.4g}") for row in ranked[:10]],
    )
    more = f", the {len(ranked) - 10} others hold more" if len(ranked) > 10 else ""
    whole = f"; saved whole: {len(found.whole)}" if found.whole else ""
    sink.note(f"{document['captured_energy']:.2%} of the energy in {len(ranked)} modules{more}{whole}")
    sink.document({"output": str(output), "format": to, **document}, ExtractedAdapterDocument)
    sink.text(str(output))
    return 0


def _chooser(include: list[str] | None, exclude: list[str] | None) -> Callable[[str], bool]:
    def chosen(name: str) -> bool:
        wanted = any(fnmatchcase(name, glob) for glob in include or ["*"])
        return wanted and not any(fnmatchcase(name, glob) for glob in exclude or [])

    return chosen


def _require_match(model: Checkpoint, include: list[str] | None, exclude: list[str] | None) -> None:
    """A glob that fits nothing is a slip. Raises ``UsageError``."""
    for flag, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs or []:
            if not any(fnmatchcase(name, glob) for name in model.tensors):
                raise UsageError(f"{flag}: '{glob}' fits no tensor", where=model.label, hint="globs are of whole names")


def _module_rank(word: str) -> tuple[str, int]:
    glob, _, text = word.rpartition("=")
    if not glob or not text.isdecimal():
        raise UsageError(f"--module-rank: '{word}' is not GLOB=N", hint="as in '*mlp*=32'; 0 leaves a module out")
    return glob, int(text)


def _document(found: ExtractedAdapter) -> Mapping[str, Any]:
    whole = sum(report.norm**2 for report in found.reports)
    kept = sum(report.captured_energy * report.norm**2 for report in found.reports)
    return {
        "captured_energy": kept / whole if whole else 1.0,
        "modules": [
            {
                "name": report.name,
                "rank": report.rank,
                "captured_energy": report.captured_energy,
                "norm": report.norm,
            }
            for report in found.reports
        ],
        "saved_whole": sorted(found.whole),
        "left_out": list(found.dropped),
    }
