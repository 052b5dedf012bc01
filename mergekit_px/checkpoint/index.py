"""The index of a sharded save: ``{"metadata": {...}, "weight_map": {tensor: file}}``.

Paths in an index come from strangers: none may leave the folder of the index. (A shard may be a symlink, as
in the Hub's cache; that is the doing of whoever owns the folder.)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath, PureWindowsPath

from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.errors import MalformedCheckpointError

INDEX_SUFFIX = ".index.json"

LARGEST_INDEX = 200_000_000
"""Bytes. An index of a million tensors has about a tenth; more is not read into memory."""


def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """The weight map: tensor name -> file name relative to the index. Raises ``MalformedCheckpointError``."""
    weight_map = parse_object(raw, where).get("weight_map")
    if not isinstance(weight_map, dict):
        raise MalformedCheckpointError("the index has no 'weight_map' object", where=where)
    checked: set[str] = set()
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise MalformedCheckpointError(f"the file of {shown(tensor)} is not a string", where=where)
        if file not in checked:
            if not is_inside(file):
                raise MalformedCheckpointError(
                    f"the file {shown(file)} of {shown(tensor)} is not a plain path inside the folder", where=where
                )
            checked.add(file)
    return weight_map


def is_inside(name: str) -> bool:
    """Whether ``name`` is a relative path, with forward slashes, that stays in its folder on every system."""
    if not name or "\\" in name or "\0" in name or name.startswith("/") or PureWindowsPath(name).drive:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def check_index(weight_map: Mapping[str, str], contents: Mapping[str, Collection[str]], where: str) -> None:
    """Index and shards must name the same tensors in the same files. ``contents``: file -> its tensors.

    Raises ``MalformedCheckpointError`` naming the first tensor at fault.
    """
    for tensor, file in weight_map.items():
        if tensor not in contents[file]:
            raise MalformedCheckpointError(
                f"the index places {shown(tensor)} in {shown(file)}, which does not hold it", where=where
            )
    for file, tensors in contents.items():
        for tensor in tensors:
            if weight_map.get(tensor) != file:
                raise MalformedCheckpointError(
                    f"{shown(file)} holds {shown(tensor)}, which the index does not place there", where=where
                )


def build_index(locations: Mapping[str, str], *, total_parameters: int, total_size: int) -> bytes:
    """The index as transformers writes it: sorted, indented by two, a newline at the end."""
    document = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": dict(locations),
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def index_name(weights_file: str) -> str:
    """``model.safetensors`` -> ``model.safetensors.index.json``."""
    return f"{PurePosixPath(weights_file).name}{INDEX_SUFFIX}"
