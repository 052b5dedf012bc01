"""One safetensors file of tensors that are in memory, written whole. Equal contents give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.header import build_header
from mergekit_px.checkpoint.replacement import replacement

if TYPE_CHECKING:
    from torch import Tensor


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
