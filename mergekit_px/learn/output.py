"""A trained model as an ordinary checkpoint: the names, shapes, dtypes and side files that it came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mergekit_px.checkpoint.destination import CONFIG_FILE
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.layout import OutputTensor, plan_layout
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.learn.models import LearningModel


def write_model(model: LearningModel, folder: Path, plan_hash: str) -> None:
    """Write the model as it now is; an older one there is replaced when the new one is complete.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        OutputError, DiskSpaceError, WriteError: the folder cannot be used, or the disk refuses.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.tensors().items()}
    metadata = {"format": "pt", **(model.checkpoint.metadata if model.checkpoint is not None else {})}
    layout = plan_layout(
        [OutputTensor(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()],
        metadata=metadata,
    )
    with CheckpointWriter(folder, layout, plan_hash, mode="overwrite") as writer:
        for name, tensor in tensors.items():
            array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            writer.write(name, 0, memoryview(array))
        writer.publish(_side_files(model))


def _side_files(model: LearningModel) -> dict[str, SideFile]:
    checkpoint = model.checkpoint
    if checkpoint is None or checkpoint.directory is None:
        return {}
    files: dict[str, SideFile] = {name: checkpoint.directory / name for name in checkpoint.side_files}
    if checkpoint.config is not None:
        files[CONFIG_FILE] = checkpoint.directory / CONFIG_FILE
    return files
