"""The files of a transported task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.layout import OutputTensor, plan_layout
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import WriteError
from mergekit_px.learn.align.rotations import Rotations
from mergekit_px.learn.models import LearningModel, read_tensors
from mergekit_px.learn.ofasd.blend import Site
from mergekit_px.learn.output import write_model

if TYPE_CHECKING:
    from mergekit_px.learn.align.run import AlignOptions

ROTATIONS_FILE = "rotations.safetensors"
TASK_VECTOR = "task_vector"
MODEL = "model"


@torch.no_grad()
def write_result(
    options: AlignOptions,
    model: LearningModel,
    sites: Sequence[Site],
    moved: Mapping[str, Tensor],
    rotations: Rotations | None,
    plan_hash: str,
) -> None:
    """Write the task vector (times the scale), the model that it makes, and the matrices.

    Tensors that nothing was transported for are zero in the task vector; integers are the base's. The model object
    is the base again afterwards.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        OutputError, WriteError: the folder cannot be used, or the disk refuses.
    """
    scale = options.settings.scale
    changes = {site.name: scale * moved[site.name] for site in sites if site.name in moved}
    for site in sites:
        site.target.copy_(site.base + changes[site.name] if site.name in changes else site.base)
    write_model(model, options.output / MODEL, plan_hash)
    for site in sites:
        site.target.copy_(site.base)
    base = model.checkpoint
    assert base is not None
    with closing(open_reader(base)) as reader:
        metadata = {"format": "pt", **task_vector_metadata(fingerprint(base, reader))}
    owner = {name: site for site in sites for name in site.names}
    kept = read_tensors(base, [name for name in base.tensors if name not in owner])
    tensors = {}
    for name, stored in base.tensors.items():
        if name not in owner:
            tensors[name] = kept[name]
            continue
        change = changes.get(owner[name].name)
        change = torch.zeros_like(owner[name].base) if change is None else change
        tensors[name] = change.cpu().reshape(stored.shape).clone()
    _write_checkpoint(tensors, options.output / TASK_VECTOR, metadata, plan_hash)
    if rotations is not None:
        _write_matrices(rotations, options.output / ROTATIONS_FILE)


def _write_checkpoint(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str], plan_hash: str) -> None:
    layout = plan_layout(
        [OutputTensor(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()],
        metadata=dict(metadata),
    )
    with CheckpointWriter(folder, layout, plan_hash, mode="overwrite") as writer:
        for name, tensor in tensors.items():
            array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            writer.write(name, 0, memoryview(array))
        writer.publish({})


def _write_matrices(rotations: Rotations, path: Path) -> None:
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    try:
        save_file(rotations.matrices(), part, {"format": "pt"})
        part.replace(path)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error
