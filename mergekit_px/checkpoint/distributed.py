"""Checkpoints that many processes wrote, each its own pieces: torch's distributed checkpoint in its two forms.

``.metadata`` and ``*.distcp`` files: the pickle of ``.metadata`` says which pieces a tensor has and where each is; a
piece is a small archive of ``torch.save`` that holds its bytes as they are. Safetensors shards
(``shard-00001-model-00001-of-00001.safetensors``): each header says where its tensors lie in the whole ones.

Only what describes tensors is read here; values are read in ranges, like those of any other file.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import Checkpoint, CheckpointFile, FileIdentity, StoredTensor
from mergekit_px.checkpoint.distributed_pickle import (
    BytesRecord,
    ChunkRecord,
    IndexRecord,
    MetadataRecord,
    PropertiesRecord,
    StorageRecord,
    TensorRecord,
    read_array,
    read_metadata,
)
from mergekit_px.checkpoint.dtypes import DTYPES, DType
from mergekit_px.checkpoint.header import Header
from mergekit_px.checkpoint.index import LARGEST_INDEX, is_inside
from mergekit_px.checkpoint.json_text import parse_json, shown
from mergekit_px.checkpoint.pieces import Piece, check_pieces
from mergekit_px.checkpoint.ranged import RangedFile, address_of, identity_now, open_ranged
from mergekit_px.errors import InputError, MalformedCheckpointError
from mergekit_px.small_files import read_small_file

METADATA_FILE = ".metadata"
SHARDING_KEY = "DCP_SHARDING_INFO"
"""Of safetensors headers: where each tensor of the file lies in the whole one."""

_SUFFIX = ".distcp"
_SHARD = re.compile(r"shard-(\d+)-")
MODEL_PLACES = ("", "model/", "model_and_optim/", "pytorch_model_fsdp_0/", "weights/", "dist_ckpt/")
"""Where trainers put the model in the folder of a step: there, or in a folder of its own (OLMo, accelerate, NeMo)."""

_WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "app")
"""Keys under which trainers put the model's state dict."""

_TRAINING = (
    *("optim", "optimizer", "optimizers", "optimizer_state_dict", "optim_state_dict", "opt", "param_groups"),
    *("lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "data_loader", "train_state", "trainer", "scaler"),
    *("rng", "rng_state", "rng_states", "progress", "step", "epoch", "global_step"),
)
"""First keys of what is not the model."""


_UNREAD = (
    (
        re.compile(r"\.distcp$"),
        f"a piece of a distributed checkpoint without its {METADATA_FILE}, which is written last",
        "wait until it is complete, or copy it again",
    ),
    (
        re.compile(r"^(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt$"),
        "a shard of DeepSpeed ZeRO, whose flat pieces are not read",
        "make a checkpoint of it with its zero_to_fp32.py",
    ),
    (
        re.compile(r"^mp_rank_\d+(_\d+)*(_model_states\.pt)?$"),
        "of one rank of a tensor-parallel training, which is not read",
        "convert it with the trainer's own tool, or save a distributed checkpoint",
    ),
)
"""Names of files and folders -> what they are, and what to do."""

_OPTIMIZERS = ("optim", "optimizer", "optimizers")
"""First words of names that were made flat before they were saved."""


def distributed_place(folder: Path, names: Iterable[str]) -> str | None:
    """Where the metadata of a distributed checkpoint is: in the folder itself (``""``), or in that of its model."""
    held = set(names)
    places = [place for place in MODEL_PLACES if place.rstrip("/") in ("", *held)]
    return next((place for place in places if (folder / place / METADATA_FILE).is_file()), None)


def refuse_unread_shards(names: Iterable[str], label: str) -> None:
    """Refuse by name what several processes wrote and the files alone do not tell how to put together.

    Raises:
        InputError: shards of DeepSpeed or Megatron, or a distributed checkpoint without its metadata.
    """
    held = sorted(names)
    for pattern, what, hint in _UNREAD:
        found = next((name for name in held if pattern.search(name)), None)
        if found is not None:
            raise InputError(f"{shown(found)} is {what}", where=label, hint=hint)


def open_distributed(folder: Path, place: str, label: str) -> Checkpoint:
    """Describe the model in a distributed checkpoint; what belongs to the training is left out, and noted.

    Args:
        place: of the metadata and its files in the folder; empty, or with a slash at its end.

    Raises:
        InputError: missing or unreadable files.
        MalformedCheckpointError: metadata of anything else, or pieces that do not make up a tensor.
    """
    where = f"{label}/{place}{METADATA_FILE}"
    raw = read_small_file(folder / place / METADATA_FILE, where, limit=LARGEST_INDEX)
    metadata = read_metadata(raw, where)
    entries = metadata.get("state_dict_metadata")
    storage = metadata.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise MalformedCheckpointError("not the metadata of a distributed checkpoint", where=where)
    names, left = _model_names(entries, metadata)
    places = _places(storage, set(names), where)
    files: dict[str, CheckpointFile] = {}
    digest = hashlib.sha256(raw).hexdigest()
    own = place + METADATA_FILE
    files[own] = CheckpointFile(own, len(raw), {}, digest, identity_now(folder / own))
    tensors: dict[str, StoredTensor] = {}
    with closing(_Files(folder, place, label)) as opened:
        for key, name in names.items():
            tensors[name] = _tensor(name, entries[key], places.get(key, {}), opened, f"{label}: {shown(name)}")
        for file, identity in opened.identities.items():
            files[file] = CheckpointFile(file, identity.size, {}, digest, identity)
    if not tensors:
        raise MalformedCheckpointError("it holds no tensors of a model", where=label, hint=_left_note(left))
    notes = (f"{label} is a distributed checkpoint{_left_note(left)}",)
    return Checkpoint(label, folder, files, tensors, kind="distributed", notes=notes)


def tensors_of_shards(headers: Mapping[str, Header], label: str) -> dict[str, StoredTensor]:
    """The whole tensors of safetensors shards whose headers say where each of their tensors lies.

    Raises ``MalformedCheckpointError`` where they do not make them up.
    """
    numbers = sorted({int(found[1]) for file in headers if (found := _SHARD.match(file))})
    if numbers != list(range(1, len(numbers) + 1)):
        number = next(each for each in range(1, numbers[-1]) if each not in numbers)
        raise MalformedCheckpointError(
            f"there are {len(numbers)} shards up to number {numbers[-1]}, and number {number} is missing",
            where=label,
            hint="copy the checkpoint again",
        )
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, DType] = {}
    for file, header in headers.items():
        where = f"{label}/{file}"
        said = parse_json(header.metadata.get(SHARDING_KEY, "{}").encode(), where)
        for entry in header.entries.values():
            start = said.get(entry.name, {}).get("saved_offsets") if isinstance(said, dict) else None
            start = [0] * len(entry.shape) if start is None else start
            if not isinstance(start, list) or not all(isinstance(each, int) and each >= 0 for each in start):
                raise MalformedCheckpointError(f"the place of {shown(entry.name)} is no row of numbers", where=where)
            if len(start) != len(entry.shape):
                raise MalformedCheckpointError(f"the place of {shown(entry.name)} has other axes than it", where=where)
            if dtypes.setdefault(entry.name, entry.dtype) != entry.dtype:
                raise MalformedCheckpointError(f"pieces of {shown(entry.name)} have different types", where=where)
            pieces.setdefault(entry.name, []).append(
                Piece(tuple(start), entry.shape, file, header.data_start + entry.begin)
            )
    return {name: _joined(name, dtypes[name], found, None, f"{label}: {shown(name)}") for name, found in pieces.items()}


def shard_notes(headers: Mapping[str, Header], label: str) -> tuple[str, ...]:
    """What cannot be told from shards: they do not say how many there are."""
    return (f"{label} is put together of {len(headers)} shards; that a last one is missing would not show in them",)


def _joined(
    name: str, dtype: DType, pieces: Sequence[Piece], shape: tuple[int, ...] | None, where: str
) -> StoredTensor:
    unique = list({piece.start: piece for piece in reversed(pieces)}.values())[::-1]  # replicas are one
    if shape is None:
        ends = zip(*(map(sum, zip(piece.start, piece.shape, strict=True)) for piece in unique), strict=True)
        shape = tuple(max(axis) for axis in ends)
    check_pieces(unique, shape, where)
    nbytes = sum(piece.elements for piece in unique) * dtype.bits // 8
    if len(unique) == 1:
        return StoredTensor(name, dtype, shape, unique[0].file, unique[0].offset, nbytes)
    return StoredTensor(name, dtype, shape, unique[0].file, unique[0].offset, nbytes, tuple(unique))


def _model_names(entries: Mapping[Any, Any], metadata: MetadataRecord) -> tuple[dict[str, str], Counter[str]]:
    """Keys of the model's tensors -> their names in the model; and how many entries each other part has."""
    planner = metadata.get("planner_data")
    paths = planner if isinstance(planner, dict) else {}
    names: dict[str, str] = {}
    left: Counter[str] = Counter()
    for key, entry in entries.items():
        if not isinstance(key, str):
            continue
        path = paths.get(key)
        parts = [str(part) for part in path] if isinstance(path, tuple) and path else [key]
        while len(parts) > 1 and parts[0] in _WRAPPERS:
            parts = parts[1:]
        first = parts[0].partition(".")[0]
        if parts[0] in _TRAINING or (first in _OPTIMIZERS and len(parts) == 1 and first != parts[0]):
            left[first] += 1
        elif isinstance(entry, BytesRecord):
            left["what is no tensor"] += 1
        else:
            names[key] = ".".join(parts)
    # Without paths, a common first word beside that of an optimizer is what the trainer called the model.
    if left and all(name.startswith("model.") for name in names.values()):
        names = {key: name.removeprefix("model.") for key, name in names.items()} if not paths else names
    return names, left


def _left_note(left: Mapping[str, int]) -> str:
    if not left:
        return ""
    listed = ", ".join(f"{count} of {part}" for part, count in left.items())
    return f"; left out, since they are not the model: {listed}"


def _places(
    storage: Mapping[Any, Any], wanted: set[str], where: str
) -> dict[str, dict[tuple[int, ...], StorageRecord]]:
    places: dict[str, dict[tuple[int, ...], StorageRecord]] = {}
    for index, info in storage.items():
        if not isinstance(index, IndexRecord) or not isinstance(info, StorageRecord):
            raise MalformedCheckpointError("its places are not those of a file system", where=where)
        if index.get("fqn") in wanted:
            places.setdefault(index.get("fqn"), {})[tuple(index.get("offset") or ())] = info
    return places


def _tensor(
    name: str, entry: Any, places: Mapping[tuple[int, ...], StorageRecord], opened: _Files, where: str
) -> StoredTensor:
    if not isinstance(entry, TensorRecord) or not isinstance(entry.get("properties"), PropertiesRecord):
        raise MalformedCheckpointError("it is described as no tensor", where=where)
    dtype = DTYPES.get(str(entry.get("properties").dtype))
    if dtype is None:
        raise MalformedCheckpointError("its type is none of a checkpoint", where=where)
    pieces = []
    for chunk in entry.get("chunks") or ():
        if not isinstance(chunk, ChunkRecord):
            raise MalformedCheckpointError("it is described as no tensor", where=where)
        start, shape = tuple(chunk.get("offsets") or ()), tuple(chunk.get("sizes") or ())
        info = places.get(start)
        if info is None:
            raise MalformedCheckpointError(f"no file holds its piece at {list(start)}", where=where)
        file, offset = opened.values(info, dtype, shape, where)
        pieces.append(Piece(start, shape, file, offset))
    return _joined(name, dtype, pieces, tuple(entry.get("size") or ()), where)


@dataclass
class _Files:
    """The files of a checkpoint, each opened once."""

    folder: Path
    place: str
    label: str

    def __post_init__(self) -> None:
        self.identities: dict[str, FileIdentity] = {}
        self._files: dict[str, RangedFile] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def values(self, info: StorageRecord, dtype: DType, shape: tuple[int, ...], where: str) -> tuple[str, int]:
        """The file of a piece, and where in it its values begin."""
        name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(name, str) or not isinstance(offset, int) or not isinstance(length, int):
            raise MalformedCheckpointError("its place is none", where=where)
        if info.get("transform_descriptors"):
            raise InputError(
                f"it was stored by {shown(str(info.get('transform_descriptors')))}, which nothing here undoes",
                where=where,
                hint="save the checkpoint without extensions",
            )
        name = self.place + name
        file = self._open(name)
        size = self.identities[name].size
        if offset < 0 or length < 0 or offset + length > size:
            raise MalformedCheckpointError(
                f"{shown(name)} is cut short: it has {size:,} bytes, and a piece ends at {offset + length:,}",
                where=self.label,
                hint="copy the checkpoint again",
            )
        nbytes = _count(shape) * dtype.bits // 8
        try:
            # Its parts lie together at both ends; from a store each read is a request.
            with io.BufferedReader(_Slice(file, offset, length)) as piece, zipfile.ZipFile(piece) as archive:
                return name, offset + _array_start(archive, piece, dtype, shape, nbytes, where)
        except (zipfile.BadZipFile, LookupError, EOFError, OSError, NotImplementedError, ValueError) as error:
            if length == nbytes:
                return name, offset  # values alone, as the safetensors form of the format has them
            raise MalformedCheckpointError(f"{shown(name)} holds no tensor at {offset:,}", where=where) from error

    def _open(self, name: str) -> RangedFile:
        if name not in self._files:
            if not is_inside(name):
                raise MalformedCheckpointError(f"it names the file {shown(name)} outside its folder", where=self.label)
            path = self.folder / name
            try:
                self._files[name] = open_ranged(path, address_of(path))
            except FileNotFoundError:
                raise MalformedCheckpointError(
                    f"{METADATA_FILE} names {shown(name)}, which is missing",
                    where=self.label,
                    hint="copy the checkpoint again",
                ) from None
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
            self.identities[name] = self._files[name].identity()
        return self._files[name]


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: RangedFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._place, self._length)[whence]
        if place < 0:
            raise OSError("before the beginning")
        self._place = place
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self._length - self._place)]
        count = self._file.read_into(self._start + self._place, wanted)
        self._place += count
        return count


def _array_start(
    archive: zipfile.ZipFile,
    piece: io.BufferedIOBase,
    dtype: DType,
    shape: tuple[int, ...],
    nbytes: int,
    where: str,
) -> int:
    """Where the values of a ``torch.save`` archive with one tensor begin, from the archive's first byte."""
    described = next((info for info in archive.infolist() if info.filename.endswith("data.pkl")), None)
    if described is None:
        raise KeyError("data.pkl")
    if described.file_size > _LARGEST_DESCRIPTION:
        raise MalformedCheckpointError("the description of a piece is too large", where=where)
    array = read_array(archive.read(described), where)
    home = described.filename.removesuffix("data.pkl")
    names = {info.filename for info in archive.infolist()}
    if f"{home}byteorder" in names and archive.read(f"{home}byteorder") != b"little":
        raise InputError("its values are in big-endian order, which is not read", where=where)
    info = archive.getinfo(f"{home}data/{array.key}")
    width = dtype.bits // 8
    if array.dtype != dtype.name or array.shape != shape:
        raise MalformedCheckpointError(
            f"a piece is {array.dtype} {list(array.shape)}, and .metadata says {dtype.name} {list(shape)}", where=where
        )
    if not _is_contiguous(array.shape, array.strides):
        raise InputError("a piece is stored transposed, which is not read", where=where)
    if info.compress_type != zipfile.ZIP_STORED or array.offset * width + nbytes > info.file_size:
        raise MalformedCheckpointError("the values of a piece are not stored as they are", where=where)
    piece.seek(info.header_offset)
    local = piece.read(30)
    return (
        info.header_offset
        + 30
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
        + array.offset * width
    )


_LARGEST_DESCRIPTION = 1 << 20


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count > 1 and stride != expected:
            return False
        expected *= max(count, 1)
    return True


def _count(shape: Sequence[int]) -> int:
    total = 1
    for axis in shape:
        total *= axis
    return total
