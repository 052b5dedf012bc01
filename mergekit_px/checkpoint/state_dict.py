"""Tensors that are in memory already, behind the same interface as tensors in files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import Checkpoint, CheckpointFile, StoredTensor
from mergekit_px.checkpoint.dtypes import byte_count, dtype_of
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError

if TYPE_CHECKING:
    import torch

_FILE = "state_dict"
_COPIES_KEPT = 4


def checkpoint_from_state_dict(label: str, state_dict: Mapping[str, torch.Tensor]) -> Checkpoint:
    """Describe tensors in memory, in the order of the mapping. Tensors may share memory.

    Raises ``InputError`` for what safetensors cannot hold: sparse, quantized or meta tensors, other dtypes.
    """
    file, tensors = describe_state_dict(state_dict, _FILE, label)
    return Checkpoint(label, None, {_FILE: file}, tensors, kind="memory")


def describe_state_dict(
    state_dict: Mapping[str, torch.Tensor], file: str, where: str
) -> tuple[CheckpointFile, dict[str, StoredTensor]]:
    """The tensors as if they stood one after another in ``file``. Raises as ``checkpoint_from_state_dict``."""
    tensors: dict[str, StoredTensor] = {}
    offset = 0
    for name, tensor in state_dict.items():
        stored = _describe(name, tensor, file, offset, where)
        tensors[name] = stored
        offset += stored.nbytes
    listing = [[stored.name, stored.dtype.name, stored.shape] for stored in tensors.values()]
    listing_sha256 = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return CheckpointFile(file, offset, {}, listing_sha256), tensors


def _describe(name: object, tensor: object, file: str, offset: int, where: str) -> StoredTensor:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{shown(str(name))} holds a {type(tensor).__name__}, not a tensor",
            where=where,
            hint="give a flat mapping of names to tensors",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise InputError("only dense tensors with values can be read", where=f"{where}: {shown(name)}")
    dtype = dtype_of(tensor.dtype)
    shape = tuple(tensor.shape)
    if dtype.bits == 4:
        if not shape:
            raise InputError("a scalar of packed four-bit pairs has no shape", where=f"{where}: {shown(name)}")
        shape = (*shape[:-1], shape[-1] * 2)
    return StoredTensor(name, dtype, shape, file, offset, byte_count(dtype, shape))


class MemoryReader:
    """Reads byte ranges of the tensors of a state dict; thread-safe.

    Contiguous CPU tensors are read in place. Others are copied when they are read, and only the last few
    copies are kept.
    """

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self._state_dict = state_dict
        self._copies: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Copy bytes ``[start, start + len(buffer))`` of ``tensor``. Raises ``InputError``."""
        import numpy

        if tensor.name not in self._state_dict:
            raise InputError("no such tensor", where=f"{tensor.file}: {shown(tensor.name)}")
        target = numpy.frombuffer(buffer, dtype=numpy.uint8)
        values = self._bytes_of(tensor.name)
        if start < 0 or start + target.size > values.size:
            raise InputError(
                f"bytes {start} to {start + target.size} asked of {values.size}",
                where=f"{tensor.file}: {shown(tensor.name)}",
            )
        # numpy lets other threads run while it copies; a memoryview assignment does not.
        numpy.copyto(target, values[start : start + target.size])

    def close(self) -> None:
        """Forget the copies; the tensors themselves are the caller's."""
        self._copies.clear()

    def _bytes_of(self, name: str) -> Any:
        import torch

        tensor = self._state_dict[name].detach()
        in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
        if in_place and not tensor.is_conj() and not tensor.is_neg():
            return tensor.reshape(-1).view(torch.uint8).numpy()
        with self._lock:
            if name not in self._copies:
                plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
                self._copies[name] = plain.reshape(-1).view(torch.uint8).numpy()
                while len(self._copies) > _COPIES_KEPT:
                    self._copies.popitem(last=False)
            self._copies.move_to_end(name)
            return self._copies[name]
