"""The header of a safetensors file: parse, check, build. Strings and numbers only; no tensor byte is touched.

A file is a little-endian u64 ``n``, ``n`` bytes of JSON that start with ``{``, and the data section. The
entries must cover the data section exactly, without holes or overlaps. Everything else is refused here, so
that no later step has to think about it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import FileIdentity
from mergekit_px.checkpoint.dtypes import DTYPES, DType, byte_count
from mergekit_px.checkpoint.json_text import depth, parse_json, shown
from mergekit_px.checkpoint.ranged import RangedFile, open_ranged
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError, UsageError

MAX_HEADER_BYTES = 100_000_000
"""The cap of the reference reader."""

_MAX_DEPTH = 127
"""Levels of JSON that the reference reader follows."""

_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_LARGEST_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one file; ``begin`` and ``end`` are byte offsets in the data section."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        entries: tensors by name, in the order of their bytes.
        metadata: the ``__metadata__`` strings.
        data_start: where the data section begins in the file: 8 + length of the JSON.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return max((entry.end for entry in self.entries.values()), default=0)


def header_length(first_eight: bytes, file_size: int, where: str) -> int:
    """Length of the JSON, from the first eight bytes of a file of ``file_size`` bytes.

    Raises ``MalformedCheckpointError``.
    """
    if len(first_eight) < _LENGTH_BYTES or file_size < _LENGTH_BYTES:
        raise MalformedCheckpointError(
            f"not a safetensors file: it has {min(len(first_eight), file_size)} bytes", where=where
        )
    length = int.from_bytes(first_eight[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedCheckpointError(
            f"not a safetensors file, or damaged: its header claims {length} bytes,"
            f" more than the {MAX_HEADER_BYTES} allowed",
            where=where,
        )
    if _LENGTH_BYTES + length > file_size:
        raise MalformedCheckpointError(
            f"the header claims {length} bytes, the whole file has {file_size}", where=where, hint=_TRUNCATED
        )
    return length


_TRUNCATED = "the file is cut short; fetch or copy it again"


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the JSON bytes of a header (padding included) against the size of the file.

    Raises ``MalformedCheckpointError`` that names ``where`` and, if one is at fault, the tensor.
    """
    if not raw.startswith(b"{"):
        raise MalformedCheckpointError("not a safetensors file: the header does not start with '{'", where=where)
    fields = parse_json(raw, where)
    if not isinstance(fields, dict):
        raise MalformedCheckpointError("the JSON is not an object", where=where)
    metadata = _parse_metadata(fields.pop(_METADATA_KEY, None), where)
    entries = [_parse_entry(name, value, f"{where}: {shown(name)}") for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    data_start = _LENGTH_BYTES + len(raw)
    _check_cover(entries, file_size - data_start, where)
    return Header(
        entries={entry.name: entry for entry in entries},
        metadata=metadata,
        data_start=data_start,
    )


def _parse_metadata(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedCheckpointError(f"{_METADATA_KEY} is not an object", where=where)
    for key, text in value.items():
        if not isinstance(text, str):
            raise MalformedCheckpointError(f"{_METADATA_KEY}: the value of {shown(key)} is not a string", where=where)
    return value


def _parse_entry(name: str, value: object, where: str) -> TensorEntry:
    if not isinstance(value, dict):
        raise MalformedCheckpointError("the entry is not an object", where=where)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in value]
    if missing:
        raise MalformedCheckpointError(f"the entry has no {missing[0]!r}", where=where)
    if len(value) > 3:
        _check_unknown(value, where)
    code = value["dtype"]
    if not isinstance(code, str) or code not in DTYPES:
        raise MalformedCheckpointError(
            f"unknown dtype {shown(str(code))}", where=where, hint="newer than safetensors 0.8, or damaged"
        )
    dtype = DTYPES[code]
    shape = _parse_counts(value["shape"], "shape", where)
    offsets = _parse_counts(value["data_offsets"], "data_offsets", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedCheckpointError(f"data_offsets {list(offsets)[:4]} are not a begin and an end", where=where)
    elements = 1
    for extent in shape:
        elements *= extent
        if elements > _LARGEST_COUNT:
            raise MalformedCheckpointError("the product of the shape overflows", where=where)
    try:
        needed = byte_count(dtype, shape)
    except MalformedCheckpointError as error:
        raise MalformedCheckpointError(error.what, where=where) from None
    begin, end = offsets
    if end - begin != needed:
        raise MalformedCheckpointError(
            f"{dtype.name} of shape {list(shape)} needs {needed} bytes, its offsets span {end - begin}", where=where
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, begin=begin, end=end)


def _check_unknown(value: dict[str, Any], where: str) -> None:
    """Refuse in unknown fields what the reference reader refuses there."""
    # The object of the header is around each entry.
    if depth(value) + 1 > _MAX_DEPTH:
        raise MalformedCheckpointError(f"an unknown field is nested more than {_MAX_DEPTH} deep", where=where)
    level: list[Any] = [value]
    while level:
        if any(type(each) is int and abs(each) > sys.float_info.max for each in level):
            raise MalformedCheckpointError("an unknown field holds a number that is out of range", where=where)
        inside = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in inside for inner in (each.values() if isinstance(each, dict) else each)]


def _parse_counts(value: object, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise MalformedCheckpointError(f"{key} is not a list", where=where)
    for number in value:
        # bool is an int in Python, so ask for the type itself.
        if type(number) is not int or not 0 <= number <= _LARGEST_COUNT:
            raise MalformedCheckpointError(f"{key} holds {shown(str(number))}, not a count", where=where)
    return tuple(value)


def _check_cover(entries: Sequence[TensorEntry], data_size: int, where: str) -> None:
    reached = 0
    for entry in entries:
        if entry.begin != reached:
            problem = "overlaps the tensor before it" if entry.begin < reached else "leaves a hole before it"
            raise MalformedCheckpointError(
                f"data_offsets [{entry.begin}, {entry.end}]: {problem}, which ends at {reached}",
                where=f"{where}: {shown(entry.name)}",
            )
        reached = entry.end
        if reached > data_size:
            raise MalformedCheckpointError(
                f"its bytes end at {reached} of a data section of {data_size}",
                where=f"{where}: {shown(entry.name)}",
                hint=_TRUNCATED,
            )
    if reached != data_size:
        raise MalformedCheckpointError(f"{data_size - reached} bytes follow the last tensor", where=where)


def read_raw_header(path: Path, where: str | None = None) -> tuple[bytes, FileIdentity]:
    """The JSON bytes of the header of ``path`` and which file that was; symlinks are followed.

    Raises ``InputNotFoundError``, ``InputError``, ``MalformedCheckpointError``.
    """
    where = where or str(path)
    try:
        with closing(open_ranged(path, where)) as file:
            identity = file.identity()
            length = header_length(read_range(file, 0, _LENGTH_BYTES), identity.size, where)
            raw = read_range(file, _LENGTH_BYTES, length)
    except FileNotFoundError:
        raise InputNotFoundError("no such file", where=where) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from error
    if len(raw) != length:
        raise MalformedCheckpointError("the header ends early", where=where, hint=_TRUNCATED)
    return raw, identity


def read_range(file: RangedFile, start: int, length: int) -> bytes:
    """Some bytes of a file, fewer only at its end."""
    buffer = bytearray(length)
    return bytes(buffer[: file.read_into(start, memoryview(buffer))])


def build_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """The first bytes of a file, length included, and the header that they say.

    Equal to what the reference writer makes: dtype rank (widest first), then name; compact JSON; spaces up to
    a multiple of 8. Metadata keys are sorted, where the reference leaves them to chance.

    Raises ``UsageError`` for a name that the format cannot hold, ``MalformedCheckpointError`` for sizes.
    """
    document: dict[str, Any] = {_METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    entries: dict[str, TensorEntry] = {}
    begin = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-tensor[1].rank, tensor[0])):
        if name == _METADATA_KEY or name in entries:
            problem = "is reserved" if name == _METADATA_KEY else "is used twice"
            raise UsageError(f"the tensor name {shown(name)} {problem}")
        end = begin + byte_count(dtype, shape)
        entries[name] = TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise UsageError("a tensor name or a metadata string is not valid Unicode") from None
    raw = text.ljust(-len(text) % 8 + len(text))
    if len(raw) > MAX_HEADER_BYTES:
        raise MalformedCheckpointError(
            f"the header would have {len(raw)} bytes, more than {MAX_HEADER_BYTES}", hint="use smaller shards"
        )
    header = Header(
        entries=entries,
        metadata=dict(metadata),
        data_start=_LENGTH_BYTES + len(raw),
    )
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, header
