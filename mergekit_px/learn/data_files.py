"""Examples from whatever people keep them in, tables of text, folders of images, arrays; and the arrays as a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import InputError, OutputError, UsageError
from mergekit_px.learn.data import IGNORED, LABELS, Examples, examples, read_arrays
from mergekit_px.learn.images import image_arrays, image_files
from mergekit_px.learn.tables import SUFFIXES, read_table
from mergekit_px.learn.text_data import NO_TEXT, TextOptions, text_arrays
from mergekit_px.learn.tokenizers import Tokenizer
from mergekit_px.plan.inputs import fetch_checkpoint


def load_data(
    path: str,
    model: Checkpoint | None = None,
    options: TextOptions = NO_TEXT,
    note: Callable[[str], None] = lambda line: None,
) -> Examples:
    """The examples of a file or folder.

    Args:
        model: whose tokenizer, processor and head texts and images are made for.
        note: gets lines about what is not used or was cut.

    Raises:
        InputError, UsageError: what cannot be read, or does not fit the model.
    """
    arrays = data_arrays(path, model, options, note)
    if LABELS not in arrays and Path(path).suffix in SUFFIXES:
        what, hint = "it has no labels, and the model predicts classes or values", "--columns label=COLUMN"
        raise InputError(what, where=path, hint=f"name the column that holds them: {hint}")
    return examples(arrays, path)


def load_data_and_labels(
    path: str,
    model: Checkpoint | None = None,
    options: TextOptions = NO_TEXT,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Examples, bool]:
    """The examples and whether they have labels; without, every label is the ignored one.

    Raises:
        InputError: as `load_data` does, and for labels that are not classes.
    """
    arrays = data_arrays(path, model, options, note)
    if LABELS not in arrays:
        return _without_labels(arrays, path), False
    found = examples(arrays, path)
    if found.arrays[LABELS].is_floating_point():
        raise InputError("the labels are values, not classes", where=path, hint="number the classes from 0")
    return found, True


def data_arrays(
    path: str, model: Checkpoint | None, options: TextOptions, note: Callable[[str], None] = lambda line: None
) -> dict[str, Tensor]:
    """The arrays of the forward pass, and labels, as a run would use them. Raises as `load_data` does."""
    place = Path(path).expanduser()
    folder = None if model is None else model.directory
    config = None if model is None else model.config
    if place.suffix in SUFFIXES and place.is_file():
        where = options.tokenizer or (model.label if model is not None else None)
        beside = Path(options.tokenizer).expanduser() if options.tokenizer is not None else folder
        if beside is None or where is None:
            raise UsageError("texts need a tokenizer", where=path, hint="give the folder of one: --tokenizer FOLDER")
        table = read_table(place, path)
        return text_arrays(table, options, Tokenizer(beside, where), config, note)
    if options != NO_TEXT:
        raise UsageError(
            "--columns, --max-length and --tokenizer are for texts",
            where=path,
            hint=f"texts come as {', '.join(SUFFIXES)}",
        )
    if place.is_dir():
        return image_arrays(place, path, folder, config)
    return read_arrays(path)


def needs_model(path: str) -> bool:
    """Whether what arrays data become depends on a model."""
    place = Path(path).expanduser()
    return place.is_dir() or place.suffix in SUFFIXES


def data_sha256(path: str) -> str:
    """Of a file; of a folder of images, of the names and contents of all that are used."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return file_sha256(place)
    found = hashlib.sha256()
    for name, files in image_files(place).items():
        for file in files:
            found.update(f"{name}\0{file.relative_to(place).as_posix()}\0{file_sha256(file)}\n".encode())
    return found.hexdigest()


def _without_labels(arrays: Mapping[str, Tensor], where: str) -> Examples:
    if not arrays:
        raise InputError("it holds no arrays", where=where)
    rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
    if rows < 2:
        raise InputError("it holds fewer than two examples", where=where)
    checked = examples({**arrays, LABELS: torch.arange(rows)}, where)
    return Examples({**checked.arrays, LABELS: torch.full((rows,), IGNORED)}, where)


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
