"""The files of a transported task vector: arithmetic on the tensors of the target base, as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.dtypes import DType, dtype_of
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputTensor
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.checkpoint.whole import read_tensor, write_tensors
from mergekit_px.errors import NonFiniteError
from mergekit_px.learn.align.fixed import Artefact
from mergekit_px.learn.output import side_files_of, write_checkpoint

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

        def write(
            folder: Path,
            dtypes: Mapping[str, DType],
            make: Callable[[StoredTensor], Tensor],
            strings: Mapping[str, str],
            side_files: Mapping[str, SideFile],
        ) -> None:
            planned = [OutputTensor(name, dtypes[name], stored.shape) for name, stored in base.tensors.items()]
            write_checkpoint(folder, planned, lambda name: make(base.tensors[name]), strings, plan_hash, side_files)

        write(output / MODEL, as_stored, changed, kept, side_files_of(base))
        write(output / TASK_VECTOR, as_changed, difference, metadata, {})
    if artefact is not None:
        write_tensors(output / artefact.file, artefact.arrays, {"format": "pt", **artefact.metadata})
