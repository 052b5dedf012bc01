"""PyTorch pickles, read without running what they contain (``weights_only``) and mapped, not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.contents import CheckpointFile, FileIdentity, StoredTensor
from mergekit_px.checkpoint.file_kind import file_kind
from mergekit_px.checkpoint.index import check_index
from mergekit_px.checkpoint.state_dict import describe_state_dict
from mergekit_px.errors import MalformedCheckpointError

if TYPE_CHECKING:
    import torch


def load_pickle(path: Path, where: str) -> dict[str, torch.Tensor]:
    """The state dict in a pickle; one that is wrapped as ``{"state_dict": ...}`` is unwrapped.

    Raises ``MalformedCheckpointError`` for anything but plain tensors.
    """
    import torch

    if not path.is_file():
        raise MalformedCheckpointError("no such file, or not a regular one", where=where)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before the zip format cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged pickle provokes
        kind = file_kind(path)
        if kind is not None and not kind.pickled:
            raise MalformedCheckpointError(
                f"not a plain PyTorch weight file but {kind.name}", where=where, hint=kind.hint
            ) from None
        raise MalformedCheckpointError(
            f"not a plain PyTorch weight file ({type(error).__name__})",
            where=where,
            hint="only tensors are read from pickles, never code",
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise MalformedCheckpointError(f"it holds a {type(loaded).__name__}, not named tensors", where=where)
    return dict(loaded)


def describe_pickles(
    folder: Path, places: Mapping[str, str], weight_map: Mapping[str, str] | None, label: str
) -> tuple[dict[str, CheckpointFile], dict[str, StoredTensor]]:
    """Files and tensors of a save in pickles; ``places``: file -> what to call it in messages.

    Raises ``InputError``, ``MalformedCheckpointError``.
    """
    files: dict[str, CheckpointFile] = {}
    tensors: dict[str, StoredTensor] = {}
    contents: dict[str, dict[str, StoredTensor]] = {}
    for name, where in places.items():
        loaded = load_pickle(folder / name, where)
        identity = FileIdentity.of((folder / name).stat())
        described, contents[name] = describe_state_dict(loaded, name, where)
        files[name] = replace(described, identity=identity)
        tensors.update(contents[name])
    if weight_map is not None:
        check_index(weight_map, contents, label)
    return files, tensors
