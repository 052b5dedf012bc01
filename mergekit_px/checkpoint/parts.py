"""Models in several folders: pipelines of diffusers, and sentence-transformers models whose modules have weights.

Each part is a checkpoint of its own. Joined, its tensors are called ``FOLDER/name`` and its files ``FOLDER/file``; what
lies in the folder that holds the parts keeps its names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.selection import select_weights
from mergekit_px.checkpoint.side_files import SideFiles
from mergekit_px.errors import MalformedCheckpointError

PIPELINE_FILE = "model_index.json"
MODULES_FILE = "modules.json"

ReadFile = Callable[[str], Any]
"""Gives the parsed content of a JSON file of the folder. Raises ``InputError``."""


def part_folders(names: Collection[str], read: ReadFile, label: str) -> tuple[str, ...]:
    """The folders of a model whose weights are loaded together, by its own list of them; none for a plain model.

    Args:
        names: of all files, relative to the folder, with forward slashes.
        read: for ``model_index.json`` and ``modules.json``.

    Raises:
        MalformedCheckpointError: a component that the pipeline's index names is not there.
        InputError: a list that cannot be read.
    """
    if PIPELINE_FILE in names:
        listed = _components(read(PIPELINE_FILE))
        found = [folder for folder in listed if holds_weights(names, folder)]
        lacking = [folder for folder in listed if folder not in found and _wants_weights(names, folder)]
        if found and lacking:
            raise MalformedCheckpointError(
                f"{PIPELINE_FILE} names the component {shown(lacking[0])}, which is missing or holds no weights",
                where=label,
                hint=f"fetch it, or give the one component that is meant: component: {found[0]}",
            )
        return tuple(found)
    if MODULES_FILE in names:
        found = [folder for folder in _modules(read(MODULES_FILE)) if holds_weights(names, folder)]
        return () if found == [""] else tuple(found)
    return ()


def _components(index: Any) -> list[str]:
    """The folders that a pipeline's index names: entries that are a library and a class."""
    return [
        name
        for name, entry in (index.items() if isinstance(index, dict) else ())
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)
        if is_inside(name)
    ]


def _modules(listed: Any) -> list[str]:
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return list(dict.fromkeys(path for path in paths if isinstance(path, str) and (path == "" or is_inside(path))))


def holds_weights(names: Iterable[str], folder: str) -> bool:
    """Whether weights lie directly in a folder; ``""`` is the one that the names are relative to."""
    return select_weights(own_names(names, folder)) is not None


def own_names(names: Iterable[str], folder: str) -> list[str]:
    """The names of a folder's own files."""
    start = f"{folder}/" if folder else ""
    return [rest for name in names if name.startswith(start) and "/" not in (rest := name[len(start) :])]


def _wants_weights(names: Iterable[str], folder: str) -> bool:
    """Whether a component has the config of a model; schedulers, tokenizers and processors have others."""
    own = own_names(names, folder)
    return not own or "config.json" in own


def joined(label: str, directory: Path | None, parts: Mapping[str, Checkpoint], side_files: SideFiles) -> Checkpoint:
    """One checkpoint of several.

    Args:
        parts: folder -> what it holds; ``""`` for weights of the folder itself.
    """
    files = {}
    tensors = {}
    for folder, part in parts.items():
        start = f"{folder}/" if folder else ""
        files.update({start + name: replace(file, name=start + name) for name, file in part.files.items()})
        for tensor in part.tensors.values():
            name = start + tensor.name
            pieces = tuple(piece._replace(file=start + piece.file) for piece in tensor.pieces)
            tensors[name] = replace(tensor, name=name, file=start + tensor.file, pieces=pieces)
    return Checkpoint(
        label,
        directory,
        files,
        tensors,
        parts[""].config if "" in parts else None,
        side_files.carried,
        side_files.left_behind,
        kind="pickle" if any(part.kind == "pickle" for part in parts.values()) else "safetensors",
        parts=parts,
    )
