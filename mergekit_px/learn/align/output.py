"""The files of a transported task vector: arithmetic on the tensors of the target base, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.destination import CONFIG_FILE
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputTensor, plan_layout
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import NonFiniteError
from mergekit_px.learn.align.fixed import Artefact
from mergekit_px.learn.artefact import write_tensors
from mergekit_px.learn.models import read_tensors

TASK_VECTOR = "task_vector"
MODEL = "model"


@torch.no_grad()
def write_result(
    output: Path, base: Checkpoint, changes: Mapping[str, Tensor], artefact: Artefact | None, plan_hash: str
) -> None:
    """Write a task vector, the model that it makes of a base, and what it was transported with.

    Tensors that nothing was transported for are zero in the task vector; integers are the base's.

    Args:
        changes: by the names of the base; a tensor that it stores under several names, under each of them.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        OutputError, WriteError: the folder cannot be used, or the disk refuses.
    """
    vector, model = {}, {}
    with closing(open_reader(base)) as reader:
        metadata = {"format": "pt", **task_vector_metadata(fingerprint(base, reader))}
    dtype = next((change.dtype for change in changes.values()), torch.float32)
    for name, tensor in read_tensors(base).items():
        if not base.tensors[name].dtype.arithmetic:
            vector[name] = model[name] = tensor
            continue
        change = (
            changes[name].cpu().reshape(tensor.shape) if name in changes else torch.zeros(tensor.shape, dtype=dtype)
        )
        vector[name] = change
        model[name] = (tensor.to(change.dtype) + change).to(tensor.dtype)
        if not bool(torch.isfinite(model[name].float()).all()):  # also beyond the stored dtype
            raise NonFiniteError(f"{shown(name)} became NaN or infinite")
    _write_checkpoint(model, output / MODEL, {"format": "pt", **base.metadata}, plan_hash, _side_files(base))
    _write_checkpoint(vector, output / TASK_VECTOR, metadata, plan_hash, {})
    if artefact is not None:
        write_tensors(output / artefact.file, artefact.arrays, {"format": "pt", **artefact.metadata})


def _write_checkpoint(
    tensors: Mapping[str, Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    plan_hash: str,
    side_files: Mapping[str, SideFile],
) -> None:
    layout = plan_layout(
        [OutputTensor(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()],
        metadata=dict(metadata),
    )
    with CheckpointWriter(folder, layout, plan_hash, mode="overwrite") as writer:
        for name, tensor in tensors.items():
            array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            writer.write(name, 0, memoryview(array))
        writer.publish(side_files)


def _side_files(base: Checkpoint) -> dict[str, SideFile]:
    if base.directory is None:
        return {}
    files: dict[str, SideFile] = {name: base.directory / name for name in base.side_files}
    if base.config is not None:
        files[CONFIG_FILE] = base.directory / CONFIG_FILE
    return files
