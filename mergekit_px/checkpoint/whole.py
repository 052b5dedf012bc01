"""Whole tensors in memory: read from a checkpoint as they are stored, and written as one safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.header import build_header
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def read_bytes(reader: TensorReader, stored: StoredTensor) -> bytearray:
    """All bytes of a tensor, without torch. Raises ``InputError``."""
    raw = bytearray(stored.nbytes)
    reader.read_into(stored, 0, memoryview(raw))
    return raw


def read_tensor(reader: TensorReader, stored: StoredTensor) -> torch.Tensor:
    """One tensor, in its own dtype and shape.

    Raises:
        InputError: it cannot be read, or torch has no such dtype.
    """
    return read_elements(reader, stored, slice(0, stored.elements)).reshape(stored.shape)


def read_tensors(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint on this machine, or all; errors as `read_tensor`."""
    with closing(open_reader(checkpoint)) as reader:
        wanted = checkpoint.tensors if names is None else names
        return {name: read_tensor(reader, checkpoint.tensors[name]) for name in wanted}


def read_elements(
    reader: TensorReader, stored: StoredTensor, piece: slice, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Some elements of a tensor, flat, in row order, in its own dtype; errors as `read_tensor`.

    Args:
        memory: uint8, at least as many bytes, that are overwritten.
    """
    import torch

    if stored.dtype.bits < 8:
        raise InputError(f"{shown(stored.name)} is packed {stored.dtype}, whose values torch cannot hold one by one")
    dtype, width = stored.dtype.torch, stored.dtype.bits // 8
    nbytes = (piece.stop - piece.start) * width
    flat = torch.empty(nbytes, dtype=torch.uint8) if memory is None else memory[:nbytes]
    if nbytes:
        array: Any = flat.numpy()
        reader.read_into(stored, piece.start * width, memoryview(array))
    return flat.view(dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file over the one before it, in one rename; tensors go one by one, without a copy.

    Raises:
        WriteError: the disk refuses.
    """
    entries = [(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    start, header = build_header(entries, metadata)
    with replacement(path) as file:
        file.write(start)
        for name in header.entries:
            file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements in row order, on the CPU."""
    import torch

    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
