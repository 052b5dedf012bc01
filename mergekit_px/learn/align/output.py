"""The files of a transported task vector: arithmetic on the tensors of the target base, as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.destination import CONFIG_FILE
from mergekit_px.checkpoint.dtypes import DType, dtype_of
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
from mergekit_px.learn.models import read_tensor

TASK_VECTOR = "task_vector"
MODEL = "model"


@torch.no_grad()
def write_result(
    output: Path,
    base: Checkpoint,
    changes: Mapping[str, Tensor],
    scale: float,
    artefact: Artefact | None,
    plan_hash: str,
) -> None:
    """Write a task vector, the model that it makes of a base, and what it was transported with.

    Tensors that nothing was transported for are zero in the task vector; integers are the base's. One tensor at a time
    is read and written.

    Args:
        changes: by the names of the base; a tensor that it stores under several names, under each of them.
        scale: their factor.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        OutputError, WriteError: the folder cannot be used, or the disk refuses.
    """
    dtype = next((change.dtype for change in changes.values()), torch.float32)
    learned = {name for name, stored in base.tensors.items() if stored.dtype.arithmetic}

    def change_of(stored: StoredTensor) -> Tensor:
        change = changes.get(stored.name)
        return torch.zeros(stored.shape, dtype=dtype) if change is None else scale * change.cpu().reshape(stored.shape)

    with closing(open_reader(base)) as reader:
        metadata = {"format": "pt", **task_vector_metadata(fingerprint(base, reader))}

        def changed(stored: StoredTensor) -> Tensor:
            tensor = read_tensor(reader, stored)
            if stored.name not in learned:
                return tensor
            moved = (tensor.to(dtype) + change_of(stored)).to(tensor.dtype)
            if not bool(torch.isfinite(moved.float()).all()):  # beyond the stored dtype too
                raise NonFiniteError(f"{shown(stored.name)} became NaN or infinite")
            return moved

        def difference(stored: StoredTensor) -> Tensor:
            return change_of(stored) if stored.name in learned else read_tensor(reader, stored)

        as_stored = {name: stored.dtype for name, stored in base.tensors.items()}
        as_changed = {name: dtype_of(dtype) if name in learned else one for name, one in as_stored.items()}
        kept = {"format": "pt", **base.metadata}
        _write_checkpoint(base, as_stored, changed, output / MODEL, kept, plan_hash, _side_files(base))
        _write_checkpoint(base, as_changed, difference, output / TASK_VECTOR, metadata, plan_hash, {})
    if artefact is not None:
        write_tensors(output / artefact.file, artefact.arrays, {"format": "pt", **artefact.metadata})


def _write_checkpoint(
    base: Checkpoint,
    dtypes: Mapping[str, DType],
    make: Callable[[StoredTensor], Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    plan_hash: str,
    side_files: Mapping[str, SideFile],
) -> None:
    """Write a tensor for each of the base's, made one after another."""
    layout = plan_layout(
        [OutputTensor(name, dtypes[name], stored.shape) for name, stored in base.tensors.items()],
        metadata=dict(metadata),
    )
    with CheckpointWriter(folder, layout, plan_hash, mode="overwrite") as writer:
        for name, stored in base.tensors.items():
            array: Any = make(stored).contiguous().reshape(-1).view(torch.uint8).numpy()
            writer.write(name, 0, memoryview(array))
        writer.publish(side_files)


def _side_files(base: Checkpoint) -> dict[str, SideFile]:
    if base.directory is None:
        return {}
    files: dict[str, SideFile] = {name: base.directory / name for name in base.side_files}
    if base.config is not None:
        files[CONFIG_FILE] = base.directory / CONFIG_FILE
    return files
