"""``pxmerge adapter convert``: from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mergekit_px.cli._documents import ConvertedAdapterDocument
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli.adapter_inputs import (
    AdapterPath,
    Overwrite,
    check_format,
    find_model,
    require_new_file,
    require_new_folder,
)

Target = Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="A folder for peft, else a file.")]
Format = Annotated[Literal["peft", "kohya", "diffusers"], typer.Option("--to", help="The format to write.")]
NamesFrom = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Gives names with underscores their dots back.")
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component", metavar="NAME", help="Part of a pipeline: unet, text_encoder, ...  [default: unet, where unsaid]"
    ),
]


def convert(
    adapter: AdapterPath,
    output: Target,
    to: Format,
    base: NamesFrom = None,
    component: Component = None,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a LoRA in another format. The numbers stay as they are; names and the place of alpha change.

    Kohya's names have underscores for dots, so the way back needs --base to look the names up; they are never
    guessed. --component says what the modules belong to where the adapter does not, and for peft which one is taken
    of a file that has several.

    \b
    Examples:
      pxmerge adapter convert ./style-lora --to kohya -o style.safetensors
      pxmerge adapter convert style.safetensors --to peft --base ./unet -o ./style-lora
    """
    check_format(to, output)
    from mergekit_px.adapters.convert import convert as write

    sink = output_for(json=json, quiet=quiet)
    (require_new_folder if to == "peft" else require_new_file)(
        output, overwrite=overwrite, inputs=[adapter, *([base] if base else [])]
    )
    from mergekit_px.plan.inputs import fetch_adapter

    source = fetch_adapter(adapter, allow_pickle=allow_pickle)[0]
    names = None if base is None else find_model(base, sink, allow_pickle=allow_pickle)
    write(source, output, to, base=names, component=component, overwrite=overwrite)
    sink.document(
        {"output": str(output), "format": to, "from": source.kind, "modules": len(source.keys.modules)},
        ConvertedAdapterDocument,
    )
    sink.text(str(output))
    return 0
