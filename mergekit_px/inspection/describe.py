"""What a checkpoint holds, as plain data, from its headers alone."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pydantic import Field

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.selection import ADAPTER_FILE
from mergekit_px.checkpoint.task_vector import COMPONENTS_KIND, KIND_KEY, base_fingerprint, is_task_vector
from mergekit_px.checkpoint.whole import read_bytes
from mergekit_px.declare.document import Document
from mergekit_px.errors import InputError
from mergekit_px.plan.components import class_name
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import stack_sizes
from mergekit_px.storage.recognise import quantised_tensors

_ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora_embedding_A", ".hada_", ".lokr_", ".oft_")


class DTypeCount(Document):
    """What is stored in one dtype."""

    tensors: int
    parameters: int
    bytes: int


class FileDescription(Document):
    """A file of weights."""

    name: str
    bytes: int
    tensors: int
    header_sha256: str | None


class ComponentDescription(Document):
    """The model in one folder of several."""

    kind: str | None = Field(alias="class")
    tensors: int
    parameters: int
    bytes: int
    dtypes: list[str]


class TensorDescription(Document):
    """A stored tensor."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str


class ModelDocument(Document):
    """What a checkpoint holds; ``matching``: the tensors whose names were asked for."""

    reference: str
    commit: str | None
    license: str | None
    kind: str
    format: str
    architectures: list[str]
    model_type: str | None
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, DTypeCount]
    layers: dict[str, int]
    tied_embeddings: bool | None
    embedding_and_head: list[str]
    base_fingerprint: str | None
    files: list[FileDescription]
    components: dict[str, ComponentDescription]
    stored_as: dict[str, int]
    side_files: list[str]
    metadata: dict[str, str]
    notes: list[str]
    matching: list[TensorDescription] | None = None


def describe(source: ResolvedInput) -> dict[str, Any]:
    """Files, sizes, dtypes, parameters, layers, tied embeddings, kind and metadata; JSON-able.

    ``layers`` counts the layers of each numbered stack of names. ``tied_embeddings`` is what the config says, None
    where it says nothing; ``embedding_and_head`` are the names of the embeddings and heads that are stored.
    ``components`` are the folders of a model in several, each by itself.
    """
    checkpoint = source.checkpoint
    tensors = checkpoint.tensors.values()
    config = checkpoint.config or {}
    return {
        "reference": source.reference,
        "commit": None if source.repo is None else source.repo.commit,
        "license": None if source.repo is None else source.repo.license,
        "kind": kind_of(checkpoint),
        "format": checkpoint.kind,
        "architectures": list(config.get("architectures") or ()),
        "model_type": config.get("model_type"),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.elements for tensor in tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": _dtypes(checkpoint),
        "layers": dict(stack_sizes(checkpoint.tensors)),
        "tied_embeddings": tied_embeddings(config),
        "embedding_and_head": [tensor.name for tensor in tensors if _is_embedding_or_head(tensor)],
        "base_fingerprint": base_fingerprint(checkpoint),
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "tensors": sum(
                    file.name in {tensor.file, *(piece.file for piece in tensor.pieces)} for tensor in tensors
                ),
                "header_sha256": file.header_sha256,
            }
            for file in checkpoint.files.values()
        ],
        "components": {folder: _component(part) for folder, part in checkpoint.parts.items()},
        "stored_as": _encodings(checkpoint),
        "side_files": list(checkpoint.side_files),
        "metadata": checkpoint.metadata,
        "notes": list(checkpoint.notes),
    }


def _component(part: Checkpoint) -> dict[str, Any]:
    return {
        "class": class_name(part.config or {}),
        "tensors": len(part.tensors),
        "parameters": sum(tensor.elements for tensor in part.tensors.values()),
        "bytes": part.nbytes,
        "dtypes": list(_dtypes(part)),
    }


def _encodings(checkpoint: Checkpoint) -> dict[str, int]:
    """What stands for values in encoded form -> how many tensors; of a model on the Hub as far as its headers tell."""
    if checkpoint.kind != "safetensors":
        return {}

    def read(tensor: StoredTensor) -> bytes:
        with closing(open_reader(checkpoint)) as reader:
            return bytes(read_bytes(reader, tensor))

    try:
        found = quantised_tensors(checkpoint, read)
    except InputError:
        return {}
    return dict(Counter([*(each.title for each in found.encodings.values()), *found.refused.values()]))


def tensor_rows(checkpoint: Checkpoint, pattern: str) -> list[dict[str, Any]]:
    """Name, dtype, shape, bytes and file of the tensors whose names match a glob."""
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": tensor.file,
        }
        for tensor in checkpoint.tensors.values()
        if fnmatch.fnmatchcase(tensor.name, pattern)
    ]


def kind_of(checkpoint: Checkpoint) -> str:
    """``model``, ``task vector``, ``components`` or ``adapter``."""
    if is_task_vector(checkpoint):
        return "task vector"
    if checkpoint.metadata.get(KIND_KEY) == COMPONENTS_KIND:
        return "components"
    if ADAPTER_FILE in checkpoint.files or any(mark in name for name in checkpoint.tensors for mark in _ADAPTER_MARKS):
        return "adapter"
    return "model"


def tied_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Whether a config ties the head to the embedding; None where it does not say."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Per dtype, most bytes first: number of tensors, parameters, bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = found.setdefault(tensor.dtype.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.elements
        entry["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _is_embedding_or_head(tensor: StoredTensor) -> bool:
    parts = tensor.name.split(".")
    if len(tensor.shape) != 2 or parts[-1] != "weight" or len(parts) < 2:
        return False
    return parts[-2] in {"lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}
