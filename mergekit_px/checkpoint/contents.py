"""What a checkpoint holds, described: tensors, files, configuration. No bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.pieces import Piece

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor and where its bytes are.

    Attributes:
        shape: in elements as a header counts them (an F4 pair of torch is two).
        file: relative to the checkpoint's folder.
        offset: of the first byte, in that file.
        nbytes: bytes of the whole tensor.
        pieces: where it is stored in several boxes; file and offset are then those of the first.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class FileIdentity(NamedTuple):
    """What the system records of a file. Every write moves ``ctime_ns``, and no program can set it back. Of an object
    in a store ``etag`` stands for the rest."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    etag: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class CheckpointFile:
    """One file of weights.

    Attributes:
        header_sha256: hex, over the JSON bytes of the header, padding included.
        identity: of the file whose header was read; None where it is not on this machine.
    """

    name: str
    size: int
    metadata: Mapping[str, str]
    header_sha256: str
    identity: FileIdentity | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model, described.

    Attributes:
        label: as the user wrote it, for messages.
        directory: the folder that holds the files; None where they are not on this machine.
        files: the weight files by name.
        tensors: by name, in the order of the files, then of the bytes.
        config: ``config.json`` parsed; None where there is none.
        side_files: the files that travel with the weights, relative to the folder.
        left_behind: file, or folder with a slash -> why it does not travel.
        kind: how the bytes are kept.
        parts: folder -> the checkpoint in it, for a model in several folders; ``""`` is the folder itself.
        notes: what its reader should hear of how it was read.
    """

    label: str
    directory: Path | None
    files: Mapping[str, CheckpointFile]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None = None
    side_files: tuple[str, ...] = ()
    left_behind: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["safetensors", "distributed", "pickle", "memory"] = "safetensors"
    parts: Mapping[str, Checkpoint] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def part_of(self, tensor: str) -> str:
        """The folder that a tensor is in, by its name; empty where the model has no parts."""
        return max((folder for folder in self.parts if tensor.startswith(f"{folder}/")), key=len, default="")

    def part(self, folder: str) -> Checkpoint:
        """One part, with the tensors as the whole describes them."""
        start = len(folder) + 1 if folder else 0
        tensors = {
            name[start:]: replace(tensor, name=name[start:])
            for name, tensor in self.tensors.items()
            if self.part_of(name) == folder
        }
        return replace(self.parts[folder], tensors=tensors)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configs by the folder that they lie in."""
        found = {folder: part.config for folder, part in self.parts.items()} if self.parts else {"": self.config}
        return {folder: config for folder, config in found.items() if config is not None}

    @property
    def metadata(self) -> dict[str, str]:
        """The header strings of all files; the later file wins."""
        return {key: text for file in self.files.values() for key, text in file.metadata.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
