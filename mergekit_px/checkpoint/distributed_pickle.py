"""The pickles of a distributed checkpoint, read without constructing anything but plain records.

Of ``.metadata`` and of the ``data.pkl`` of each tensor only the classes of the format are known, and each is stood in
for by a record or a function of this module. A pickle that names anything else is refused before anything is made.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import MalformedCheckpointError

_TORCH_NAMES = {dtype.torch_name: dtype.name for dtype in DTYPES.values() if dtype.torch_name}


class Record:
    """Stands in for a class of the format: it holds what the pickle says, and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A field; None where it is left out."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class MetadataRecord(Record):
    pass


class TensorRecord(Record):
    pass


class BytesRecord(Record):
    pass


class ChunkRecord(Record):
    pass


class IndexRecord(Record):
    """A key of a mapping; equal to itself alone, which is enough to walk over the entries."""


class StorageRecord(Record):
    pass


class PropertiesRecord(Record):
    @property
    def dtype(self) -> Any:
        return self.state[0] if isinstance(self.state, tuple) and self.state else self.get("dtype")


class OtherRecord(Record):
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class StoredArray:
    """A tensor as ``torch.save`` describes it: elements of a storage."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _size(values: Any = ()) -> tuple[int, ...]:
    found = tuple(values)
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in found):
        raise ValueError("a size that is no row of whole numbers")
    return found


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES: Mapping[tuple[str, str], Callable[..., Any]] = {
    (_METADATA, "Metadata"): MetadataRecord,
    (_METADATA, "TensorStorageMetadata"): TensorRecord,
    (_METADATA, "BytesStorageMetadata"): BytesRecord,
    (_METADATA, "ChunkStorageMetadata"): ChunkRecord,
    (_METADATA, "MetadataIndex"): IndexRecord,
    (_METADATA, "StorageMeta"): OtherRecord,
    (_METADATA, "TensorProperties"): PropertiesRecord,
    (_METADATA, "_MEM_FORMAT_ENCODING"): OtherRecord,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): PropertiesRecord,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): OtherRecord,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageRecord,
    ("torch.serialization", "_get_layout"): OtherRecord,
    ("torch", "Size"): _size,
    # What a checkpoint was called when it was saved.
    ("pathlib", "PosixPath"): OtherRecord,
    ("pathlib", "WindowsPath"): OtherRecord,
    ("pathlib._local", "PosixPath"): OtherRecord,
    ("pathlib._local", "WindowsPath"): OtherRecord,
    ("collections", "OrderedDict"): dict,
}
"""The classes of ``.metadata``, of torch 2.0 and later."""


def read_metadata(data: bytes, where: str) -> MetadataRecord:
    """What ``.metadata`` holds. Raises ``MalformedCheckpointError``."""
    found = _load(_MetadataUnpickler(io.BytesIO(data)), where)
    if not isinstance(found, MetadataRecord) or not isinstance(found.state, dict):
        raise MalformedCheckpointError("not the metadata of a distributed checkpoint", where=where)
    return found


def read_array(data: bytes, where: str) -> StoredArray:
    """What a ``data.pkl`` says of its tensor. Raises ``MalformedCheckpointError``."""
    found = _load(_ArrayUnpickler(io.BytesIO(data)), where)
    if not isinstance(found, StoredArray):
        raise MalformedCheckpointError("it holds no plain tensor", where=where)
    return found


class _ForeignClassError(pickle.UnpicklingError):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and name in _TORCH_NAMES:
            return _TORCH_NAMES[name]
        raise _ForeignClassError(f"{module}.{name}")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch", "Size"):
            return _size
        if module in ("torch", "torch.storage") and (dtype := _of_storage(name)) is not None:
            return dtype
        if module == "torch" and name in _TORCH_NAMES:
            return _TORCH_NAMES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuilt_v3
        raise _ForeignClassError(f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> tuple[str, str]:
        kind, dtype, key, _, _ = identifier
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError("a storage of another kind")
        return dtype, key


_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}


def _of_storage(name: str) -> str | None:
    return _STORAGES.get(name)


def _rebuilt(storage: tuple[str, str], offset: int, size: Any, stride: Any, *_: Any) -> StoredArray:
    dtype, key = storage
    return StoredArray(key, dtype, int(offset), _size(size), _size(stride))


def _rebuilt_v3(
    storage: tuple[str, str], offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: str, *_: Any
) -> StoredArray:
    return StoredArray(storage[1], str(dtype), int(offset), _size(size), _size(stride))


def _parameter(data: StoredArray, *_: Any) -> StoredArray:
    return data


def _load(unpickler: pickle.Unpickler, where: str) -> Any:
    try:
        return unpickler.load()
    except _ForeignClassError as error:
        raise MalformedCheckpointError(
            f"its pickle names {shown(str(error))}, which is no class of the format; nothing of it was made",
            where=where,
            hint="only tensors are read from a distributed checkpoint, never code",
        ) from None
    except Exception as error:  # whatever a hostile or damaged pickle provokes
        raise MalformedCheckpointError(
            f"a damaged pickle ({type(error).__name__})", where=where, hint="copy the checkpoint again"
        ) from error
