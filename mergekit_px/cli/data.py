"""``pxmerge data``: the arrays that a learner would make of texts or images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._text_columns import TextColumns

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Whose tokenizer, image settings and classes are used.")]
File = Annotated[
    str, typer.Argument(metavar="FILE", help="Texts (.jsonl, .csv, .parquet), a folder of images by class, or arrays.")
]
Target = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]


def data(
    model: Model,
    file: File,
    output: Target,
    text: TextColumns,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write the arrays that `ofasd`, `align`, `tune`, `stats`, `search` and `transfer` would make of a data file.

    Those commands take the file itself. The arrays pin it: they depend on no tokenizer and no reader of images any
    more, and give the same results.

    \b
    Examples:
      pxmerge data ./base reviews.jsonl -o reviews.safetensors
      pxmerge data ./base chats.jsonl -o chats.safetensors --max-length 512
      pxmerge data ./base table.csv -o table.safetensors --columns text=body label=topic
    """
    from mergekit_px.learn.data_files import write_arrays

    sink = output_for(json=json, quiet=quiet, writes=True)
    report = write_arrays(
        model, file, output, text.options(), overwrite=overwrite, allow_pickle=allow_pickle, note=sink.note
    )
    sink.document({"output": str(output), **report})
    sink.pairs((name, f"{one['dtype']} {one['shape']}") for name, one in report["arrays"].items())
    sink.text(str(output))
    return 0
