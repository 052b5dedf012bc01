"""``pxmerge acmap export``: prototypes as the weights of a linear head, or a merged adapter, out of a state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.errors import UsageError

StateFile = Annotated[Path, typer.Option("--state", metavar="FILE", help="The state that `acmap merge` keeps.")]
Result = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors file to write.")]
AdapterOf = Annotated[
    int | None, typer.Option("--adapter", metavar="T", min=1, help="Write the merged adapter of T tasks instead.")
]
Prefix = Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Before the names weight and bias, as head.")]
Bias = Annotated[bool, typer.Option("--bias", help="Add a bias of zeros.")]
Raw = Annotated[bool, typer.Option("--raw", help="Leave the prototypes' lengths: an inner product, not a cosine.")]
NoMapping = Annotated[bool, typer.Option("--no-mapping", help="Use the prototypes as they were stored.")]
Concatenate = Annotated[bool, typer.Option("--concatenate", help="For features with those without adapters appended.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]


def export(
    state: StateFile,
    output: Result,
    adapter: AdapterOf = None,
    prefix: Prefix = "",
    bias: Bias = False,
    raw: Raw = False,
    no_mapping: NoMapping = False,
    concatenate: Concatenate = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write the prototypes as a linear head: weight (classes, d), one row of length 1 for each class in order.

    The head's largest output is the class that `acmap classify` finds; the classes of the rows are in the header of
    the file. With --adapter the merged adapter of so many tasks is written, to compute features with elsewhere.

    \b
    Examples:
      pxmerge acmap export --state acmap.safetensors -o head.safetensors --prefix head.
      pxmerge acmap export --state acmap.safetensors -o merged2.safetensors --adapter 2
    """
    if adapter is not None and (prefix or bias or raw or no_mapping or concatenate):
        raise UsageError("--adapter writes an adapter, which is no head", hint="leave out the options of the head")
    from mergekit_px.adapters.acmap_stored import StoredState
    from mergekit_px.learn.acmap.export import require_new, write_adapter, write_head

    sink = output_for(json=json, quiet=quiet)
    require_new(output, overwrite=overwrite)
    stored = StoredState(state)
    found: dict[str, Any] = {"output": str(output)}
    if adapter is not None:
        write_adapter(stored, output, adapter)
        found["adapter"] = stored.number(adapter)
    else:
        found |= write_head(
            stored, output, prefix=prefix, bias=bias, raw=raw, mapped=not no_mapping, concatenate=concatenate
        )
        if found["classes"] != list(range(len(found["classes"]))):
            sink.note("the classes are not numbered 0, 1, 2, ...: row r of the head is the r-th class in order")
    sink.document(found)
    sink.text(str(output))
    return 0
