"""The state file of ACMap: one safetensors file, replaced in one rename, whose tensors are in named groups.

========================  =============================================================================
``high:`` ``low:``        the sums of the merged adapters, as pairs of float64 numbers
``kept:``                 how many adapters kept an entry (mode ``trim``)
``first:`` ``fixed:``     the first adapter: its floating-point tensors, and the others
``past1:``, ``past2:`` …  the merged adapter after each task
``prototypes:``           the table of class prototypes, if tasks have been mapped
========================  =============================================================================

The settings are a JSON document among the header strings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.header import build_header
from mergekit_px.checkpoint.json_text import parse_object
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.checkpoint.whole import tensor_bytes
from mergekit_px.errors import MalformedCheckpointError, WriteError

if TYPE_CHECKING:
    import torch

PROTOTYPES = "prototypes"

_FORMAT = "pxmerge-acmap-1"
_PIECE = 8 << 20


def key(group: str, name: str) -> str:
    """The name in the file of a tensor of a group."""
    return f"{group}:{name}"


def past_group(number: int) -> str:
    """The group of the merged adapter after ``number`` tasks."""
    return f"past{number}"


def past_number(group: str) -> int | None:
    """The number of a group of merged adapters; None for other groups."""
    text = group.removeprefix("past")
    return int(text) if text != group and text.isdecimal() else None


def read_settings(checkpoint: Checkpoint, where: str) -> dict[str, Any]:
    """The settings of a state. Raises MalformedCheckpointError for another file."""
    text = checkpoint.metadata.get(_FORMAT)
    if text is None:
        raise MalformedCheckpointError("this is not a state of acmap", where=where)
    return parse_object(text, where, strict=False)


def write_state(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    kept: Checkpoint | None = None,
) -> None:
    """Write a state over the one before it: complete, or not at all.

    Args:
        tensors: by their names in the file.
        kept: a checkpoint whose tensors are carried over, piece by piece, except those of the same names.

    Raises:
        WriteError: the disk refuses.
        InputError: a tensor that is carried over cannot be read.
    """
    old = {} if kept is None else {name: one for name, one in kept.tensors.items() if name not in tensors}
    entries = [(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries += [(name, stored.dtype, stored.shape) for name, stored in old.items()]
    start, header = build_header(entries, {_FORMAT: json.dumps(settings, sort_keys=True)})
    reader = None if kept is None else open_reader(kept)
    try:
        with replacement(path) as file:
            file.write(start)
            for name in header.entries:
                if name in tensors:
                    file.write(tensor_bytes(tensors[name]))
                elif reader is not None:
                    for piece in _pieces(old[name]):
                        buffer = bytearray(piece.stop - piece.start)
                        reader.read_into(old[name], piece.start, memoryview(buffer))
                        file.write(buffer)
    finally:
        if reader is not None:
            reader.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a state file against other processes that would write it.

    Raises:
        OutputLockedError: another process has it.
        WriteError: there is no folder for it, or it cannot be written to.
    """
    try:
        if not os.access(path.parent, os.W_OK):
            raise FileNotFoundError(0, "there is no such folder, or it may not be written to")
        lock = DirectoryLock.take(path.with_name(path.name + ".lock"), str(path))
    except OSError as error:
        raise WriteError(f"cannot be written: {error.strerror}", where=str(path)) from error
    try:
        yield
    finally:
        lock.release(remove=True)


def _pieces(stored: StoredTensor) -> Iterator[range]:
    for begin in range(0, stored.nbytes, _PIECE):
        yield range(begin, min(begin + _PIECE, stored.nbytes))
