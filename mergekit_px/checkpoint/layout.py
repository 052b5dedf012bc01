"""Which output tensor goes into which shard at which byte: fixed before anything is computed.

Names and split as the Hub's libraries make them: ``model.safetensors``, or ``model-00001-of-0000N.safetensors``
with an index; shards filled greedily in the given order; a tensor above the limit has a shard of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from mergekit_px.checkpoint.dtypes import DType, byte_count
from mergekit_px.checkpoint.header import Header, build_header
from mergekit_px.checkpoint.index import build_index, index_name
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import UsageError

DEFAULT_SHARD_SIZE = 5_000_000_000

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written; ``shape`` in elements as a header counts them.

    ``folder``: of a model in several folders, the one that it goes to; its name begins with it, the name in the file
    does not. ``together``: neighbours of which this is the same go into one file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    folder: str = ""
    together: str = ""

    @property
    def stored_name(self) -> str:
        return self.name[len(self.folder) + 1 :] if self.folder else self.name


@dataclass(frozen=True)
class OutputShard:
    """One file to be written. ``header_bytes`` are its first bytes, ``size`` is that of the whole file."""

    file: str
    header: Header
    header_bytes: bytes
    size: int


@dataclass(frozen=True)
class OutputLayout:
    """The whole output.

    Attributes:
        shards: the files, in order.
        indices: the bytes of the JSON index, by its name, of each folder whose weights are in several files.
        location: tensor name -> (position in ``shards``, absolute offset in that file, bytes).
    """

    shards: tuple[OutputShard, ...]
    indices: Mapping[str, bytes]
    location: Mapping[str, tuple[int, int, int]]

    @property
    def size(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.size for shard in self.shards)


def plan_layout(
    tensors: Sequence[OutputTensor],
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    stems: Mapping[str, str] | None = None,
    metadata: Mapping[str, str],
    more_metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> OutputLayout:
    """Split ``tensors``, in their order, into shards of at most ``shard_size`` bytes of data.

    Args:
        stems: folder -> what the names of its files begin with; ``model`` where nothing is said.
        metadata: what goes into the header of every shard.
        more_metadata: folder -> what goes into the headers of its shards beside that, or in its place.

    Raises ``UsageError`` for a shard size below one and for names used twice, ``MalformedCheckpointError`` for shapes
    that do not fill whole bytes.
    """
    if shard_size < 1:
        raise UsageError(f"a shard of {shard_size} bytes holds nothing")
    folders: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        folders.setdefault(tensor.folder, []).append(tensor)
    shards: list[OutputShard] = []
    indices: dict[str, bytes] = {}
    location: dict[str, tuple[int, int, int]] = {}
    for folder, members in folders.items() or [("", [])]:
        stem = (stems or {}).get(folder, "model")
        start = f"{folder}/" if folder else ""
        own = {**metadata, **(more_metadata or {}).get(folder, {})}
        groups = _split(members, shard_size)
        held: dict[str, str] = {}
        for number, group in enumerate(groups):
            suffix = f"-{number + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            header_bytes, header = build_header([(each.stored_name, each.dtype, each.shape) for each in group], own)
            file = f"{stem}{suffix}.safetensors"
            for entry in header.entries.values():
                if start + entry.name in location:
                    raise UsageError(f"the tensor name {shown(entry.name)} is used twice")
                place = (len(shards), header.data_start + entry.begin, entry.end - entry.begin)
                location[start + entry.name] = place
                held[entry.name] = file
            size = header.data_start + header.data_size
            shards.append(OutputShard(start + file, header, header_bytes, size))
        if len(groups) > 1:
            indices[start + index_name(f"{stem}.safetensors")] = build_index(
                held,
                total_parameters=sum(math.prod(tensor.shape) for tensor in members),
                total_size=sum(location[tensor.name][2] for tensor in members),
            )
    return OutputLayout(tuple(shards), indices, location)


def _split(tensors: Sequence[OutputTensor], shard_size: int) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    filled = 0
    for _, neighbours in groupby(tensors, key=lambda tensor: tensor.together or tensor):
        group = list(neighbours)
        nbytes = sum(byte_count(tensor.dtype, tensor.shape) for tensor in group)
        if nbytes > shard_size:
            # A shard of their own, in front of the one being filled, which stays open: so does the Hub's splitter.
            groups.append(group)
            continue
        if filled + nbytes > shard_size:
            groups.append(current)
            current, filled = [], 0
        current += group
        filled += nbytes
    if current or not groups:
        groups.append(current)
    return groups


def parse_size(text: str | int, where: str | None = None) -> int:
    """Bytes meant by ``5GB`` (decimal), ``5GiB`` (binary), ``1.5 GB``, ``200MB`` or a plain number.

    ``where``: the flag or key that it was given for. Raises ``UsageError``.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", str(text).strip().upper())
        if match is None or match[2] not in _UNITS:
            raise UsageError(f"{text!r} is not a size", where=where, hint="write one such as 5GB, 512MiB or 1000000")
        size = int(Fraction(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise UsageError(
            f"the size {text!r} is not above zero", where=where, hint="write one such as 5GB, 512MiB or 1000000"
        )
    return size
