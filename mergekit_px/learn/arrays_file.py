"""Data of any kind as a file of the arrays that a run would use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.tensor_file import write_tensors
from mergekit_px.errors import OutputError
from mergekit_px.learn.data import LABELS, examples
from mergekit_px.learn.data_files import data_arrays, data_sha256
from mergekit_px.learn.text_data import TextOptions
from mergekit_px.plan.inputs import fetch_checkpoint

DATA_KIND = "data"


def write_arrays(
    model: str,
    data: str,
    output: Path,
    options: TextOptions,
    *,
    overwrite: bool = False,
    allow_pickle: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write ``output``; equal inputs give equal bytes.

    Returns:
        the hash of the data, how many examples there are, and dtype and shape of each array.

    Raises:
        UsageError, InputError: data that cannot be read or do not fit the model.
        OutputError: a name without .safetensors, or a file that is not to be replaced.
    """
    if output.suffix != ".safetensors":
        raise OutputError("arrays are written as .safetensors", where=str(output), hint="end the name so")
    if output.is_dir() or (output.exists() and not overwrite):
        hint = "name a file" if output.is_dir() else "replace it with --overwrite, or name another"
        raise OutputError("it is a folder" if output.is_dir() else "it exists already", where=str(output), hint=hint)
    checkpoint = fetch_checkpoint(model, allow_pickle=allow_pickle)
    arrays = data_arrays(data, checkpoint, options, note)
    if LABELS in arrays:
        arrays = dict(examples(arrays, data).arrays)
    output.parent.mkdir(parents=True, exist_ok=True)
    digest = data_sha256(data)
    write_tensors(output, arrays, {"pxmerge.kind": DATA_KIND, "pxmerge.data_sha256": digest})
    return {
        "data": data,
        "data_sha256": digest,
        "examples": len(next(iter(arrays.values()))),
        "arrays": {
            name: {"dtype": str(one.dtype).removeprefix("torch."), "shape": list(one.shape)}
            for name, one in arrays.items()
        },
    }
