"""What is learnt, as files written whole: reports, recipes, and a trained model as an ordinary checkpoint, with the
names, shapes, dtypes and side files that it came with. Equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_px.checkpoint.contents import CONFIG_FILE, Checkpoint
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.layout import OutputTensor, plan_layout
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.checkpoint.whole import tensor_bytes
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.learn.models import LearningModel


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document over the one before it, in one rename. Raises ``WriteError``."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text over the one before it, in one rename. Raises ``WriteError``."""
    with replacement(path) as file:
        file.write(text.encode())


def write_model(model: LearningModel, folder: Path, plan_hash: str) -> None:
    """Write the model as it now is; an older one there is replaced when the new one is complete.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        OutputError, DiskSpaceError, WriteError: the folder cannot be used, or the disk refuses.
    """
    tensors = model.tensors()
    planned = [OutputTensor(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    origin = model.checkpoint
    metadata = {"format": "pt", **(origin.metadata if origin is not None else {})}
    side_files = side_files_of(origin) if origin is not None else {}
    write_checkpoint(folder, planned, tensors.__getitem__, metadata, plan_hash, side_files)


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    plan_hash: str,
    side_files: Mapping[str, SideFile],
) -> None:
    """Write tensors made one after another, each by its name; errors as `write_model`."""
    layout = plan_layout(list(tensors), metadata=dict(metadata))
    with CheckpointWriter(folder, layout, plan_hash, mode="overwrite") as writer:
        for one in tensors:
            writer.write(one.name, 0, tensor_bytes(make(one.name)))
        writer.publish(side_files)


def side_files_of(checkpoint: Checkpoint) -> dict[str, SideFile]:
    """What travels with the weights of a folder, the config among it."""
    if checkpoint.directory is None:
        return {}
    files: dict[str, SideFile] = {name: checkpoint.directory / name for name in checkpoint.side_files}
    if checkpoint.config is not None:
        files[CONFIG_FILE] = checkpoint.directory / CONFIG_FILE
    return files
