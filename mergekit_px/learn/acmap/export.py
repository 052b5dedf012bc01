"""Out of a state: the table of prototypes, a linear head, a merged adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import OutputError
from mergekit_px.learn.acmap.prototypes import Prototypes

CLASSES_KEY = "pxmerge.classes"


def write_prototypes(table: Prototypes, output: Path) -> None:
    """``prototypes`` (mapped) and ``original`` (classes, d) float32, ``plain`` if there is one; ``class``, ``task``,
    ``count`` int64. Raises WriteError."""
    tensors = {
        "prototypes": table.mapped().float(),
        "original": table.vectors.float(),
        "class": table.classes,
        "task": table.tasks,
        "count": table.counts,
    }
    if table.plain is not None:
        tensors["plain"] = table.plain.float()
    write_tensors(output, tensors, {"format": "pt", CLASSES_KEY: json.dumps(table.classes.tolist())})


def write_head(
    stored: StoredState,
    output: Path,
    *,
    prefix: str = "",
    bias: bool = False,
    raw: bool = False,
    mapped: bool = True,
    concatenate: bool = False,
) -> dict[str, Any]:
    """The weights of a linear layer whose largest output is the nearest prototype by cosine.

    Row r is the prototype of the r-th class in ascending order, of length 1: ``argmax_c cos(f, p_c)`` is
    ``argmax_c <f, p_c / |p_c|>`` whatever the length of f.

    Args:
        prefix: before ``weight`` (classes, d) float32 and ``bias`` (classes), as ``head.``.
        bias: write a bias of zeros.
        raw: leave the lengths of the prototypes: an inner product, not a cosine.

    Returns:
        the classes of the rows, and their width.

    Raises:
        InputError: the state has no prototypes, or none without an adapter to concatenate.
        WriteError: the disk refuses.
    """
    table = Prototypes.of(stored)
    rows = table.table(mapped=mapped, plain=concatenate, where=stored.where)
    weight = rows if raw else torch.nn.functional.normalize(rows, dim=1)
    tensors = {f"{prefix}weight": weight.float()}
    if bias:
        tensors[f"{prefix}bias"] = torch.zeros(len(weight))
    classes = table.classes.tolist()
    write_tensors(output, tensors, {"format": "pt", CLASSES_KEY: json.dumps(classes)})
    return {"classes": classes, "dimension": weight.shape[1]}


def write_adapter(stored: StoredState, output: Path, number: int) -> None:
    """The merged adapter of the first ``number`` tasks.

    Raises:
        InputError: not merged yet, or not kept.
        WriteError: the disk refuses.
    """
    adapter = stored.adapter(stored.number(number))
    write_tensors(output, {name: adapter[name] for name in sorted(adapter)}, {"format": "pt"})


def require_new(output: Path, *, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Raise ``OutputError`` for another suffix, a folder, or a file that is not to be replaced."""
    if output.suffix != suffix:
        raise OutputError(f"this is written as {suffix}", where=str(output), hint="end the name so")
    if output.is_dir() or (output.exists() and not overwrite):
        raise OutputError("it exists already", where=str(output), hint="replace it with --overwrite, or name another")
