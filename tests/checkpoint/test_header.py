"""Headers: equal to the reference writer's, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    build_header,
    header_length,
    parse_header,
    read_raw_header,
)
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError, UsageError


def read_header(path: Path) -> Header:
    raw, identity = read_raw_header(path)
    return parse_header(raw, identity.size, str(path))


def file_with(tmp_path: Path, document: object, data: bytes = b"", *, raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(document).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        if dtype.torch_name is None:
            continue
        for name, size in (("b", 16), ("a", 48), ("empty", 0)):
            raw = torch.randint(0, 2 if dtype.name == "BOOL" else 256, (size,), dtype=torch.uint8)
            tensors[f"{name}.{dtype.name.lower()}"] = raw.view(dtype.torch).reshape(2, -1)
    tensors["scalar"] = torch.tensor(3.0)
    tensors['naïve "quoted"\n\x7f\x01 名前'] = torch.ones(3, dtype=torch.bfloat16)
    return tensors


def described(tensors: dict[str, torch.Tensor]) -> list[tuple[str, object, tuple[int, ...]]]:
    from mergekit_px.checkpoint.reader import checkpoint_from_state_dict

    checkpoint = checkpoint_from_state_dict("memory", tensors)
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}], ids=["bare", "pt"])
def test_bytes_equal_the_reference_writer(tmp_path, metadata) -> None:
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "reference.safetensors", metadata=metadata or None)
    expected = (tmp_path / "reference.safetensors").read_bytes()
    start, header = build_header(described(tensors), metadata)
    assert expected.startswith(start)
    data = b"".join(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in header.entries)
    assert start + data == expected
    assert read_header(tmp_path / "reference.safetensors") == header


def test_what_is_built_loads_in_the_reference_reader(tmp_path) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    start, header = build_header(described(tensors), {"z": "1", "a": "2"})
    data = b"".join(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in header.entries)
    (tmp_path / "x.safetensors").write_bytes(start + data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert len(start) % 8 == 0 and start.index(b'"a"') < start.index(b'"z"')


def test_six_bit_types_are_laid_out_as_the_format_says(tmp_path) -> None:
    start, header = build_header([("x", DTYPES["F6_E2M3"], (2, 2)), ("y", DTYPES["U8"], (1,))], {})
    assert [(each.name, each.begin, each.end) for each in header.entries.values()] == [("y", 0, 1), ("x", 1, 4)]
    assert parse_header(start[8:], len(start) + 4, "x") == header


def test_offset_order_is_kept_whatever_the_order_of_the_json(tmp_path) -> None:
    path = file_with(tmp_path, {"late": entry(offsets=(8, 16)), "early": entry()}, b"\0" * 16)
    header = read_header(path)
    assert list(header.entries) == ["early", "late"]
    assert header.data_start + header.data_size == path.stat().st_size


def test_padding_null_metadata_and_empty_files_are_legal(tmp_path) -> None:
    assert read_header(file_with(tmp_path, {})).entries == {}
    raw = b'{"__metadata__":null,"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}' + b" " * 4000
    header = read_header(file_with(tmp_path, None, b"\0" * 4, raw=raw))
    assert header.metadata == {} and header.entries["x"].shape == ()


BAD_DOCUMENTS = {
    "array": ([], b"", "does not start with"),
    "entry not an object": ({"x": 3}, b"", "x: the entry is not an object"),
    "entry as a list": ({"x": ["F32", [2], [0, 8]]}, b"\0" * 8, "x: the entry is not an object"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "has no 'dtype'"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8, "has no 'shape'"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "has no 'data_offsets'"),
    "unknown dtype": ({"x": entry("F7")}, b"\0" * 8, "x: unknown dtype F7"),
    "lower-case dtype": ({"x": entry("f32")}, b"\0" * 8, "unknown dtype f32"),
    "dtype of wrong type": ({"x": entry(["F32"])}, b"\0" * 8, "unknown dtype"),
    "negative extent": ({"x": entry(shape=[-2])}, b"\0" * 8, "shape holds -2, not a count"),
    "bool extent": ({"x": entry(shape=[True, 2])}, b"\0" * 8, "shape holds True"),
    "float extent": ({"x": entry(shape=[2.0])}, b"\0" * 8, "shape holds 2.0"),
    "huge extent": ({"x": entry(shape=[2**63])}, b"\0" * 8, "shape holds"),
    "shape not a list": ({"x": entry(shape="2")}, b"\0" * 8, "shape is not a list"),
    "overflow": ({"x": entry(shape=[2**40, 2**40])}, b"\0" * 8, "overflows"),
    "overflow hidden by zero": ({"x": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b"", "overflows"),
    "wrong byte count": ({"x": entry(shape=[3])}, b"\0" * 8, "needs 12 bytes, its offsets span 8"),
    "part of a byte": ({"x": entry("F4", [3], [0, 2])}, b"\0" * 2, "x: shape .3. of F4 does not fill whole bytes"),
    "three offsets": ({"x": entry(offsets=[0, 8, 8])}, b"\0" * 8, "not a begin and an end"),
    "backward offsets": ({"x": entry(shape=[0], offsets=[8, 0])}, b"\0" * 8, "not a begin and an end"),
    "float offsets": ({"x": entry(offsets=[0.0, 8])}, b"\0" * 8, "data_offsets holds 0.0"),
    "overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, b"\0" * 12, "y: .*overlaps the tensor before it"),
    "same bytes twice": ({"x": entry(), "y": entry()}, b"\0" * 8, "overlaps"),
    "hole": ({"x": entry(), "y": entry(offsets=[12, 20])}, b"\0" * 20, "y: .*leaves a hole"),
    "hole at the start": ({"x": entry(offsets=[8, 16])}, b"\0" * 16, "x: .*leaves a hole"),
    "trailing bytes": ({"x": entry()}, b"\0" * 18, "10 bytes follow the last tensor"),
    "trailing bytes, no tensors": ({}, b"\0", "1 bytes follow"),
    "truncated": ({"x": entry()}, b"\0" * 5, "x: its bytes end at 8 of a data section of 5; the file is cut short"),
    "metadata not an object": ({"__metadata__": [1]}, b"", "__metadata__ is not an object"),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", "value of a is not a string"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_malformed_documents(tmp_path, case) -> None:
    document, data, message = BAD_DOCUMENTS[case]
    path = file_with(tmp_path, document, data)
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


BAD_TEXTS = {
    "not JSON": (b"{no", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8 at byte 2"),
    "UTF-16": ('{"a":1}'.encode("utf-16-le"), "not valid JSON"),
    "BOM": ("\ufeff{}".encode(), "does not start with"),
    "leading space": (b" {}", "does not start with"),
    "nothing": (b"", "does not start with"),
    "trailing text": (b"{} {}", "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 200_000, "nested too deeply"),
    "duplicate tensor": (
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        "the key x occurs twice",
    ),
    "duplicate field": (b'{"x":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', "dtype occurs twice"),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', "the key a occurs twice"),
    "NaN": (b'{"x":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "NaN is not JSON"),
    "endless number": (b'{"x":' + b"9" * 5000 + b"}", "not valid JSON"),
    "unpaired surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "unpaired surrogate"),
    "control character": (b'{"a\nb":1}', "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_malformed_texts(tmp_path, case) -> None:
    raw, message = BAD_TEXTS[case]
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        read_header(file_with(tmp_path, None, raw=raw))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_too_short_for_a_length(tmp_path, size) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\1" * size)
    with pytest.raises(MalformedCheckpointError, match=f"it has {size} bytes"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_absurd_lengths(length) -> None:
    with pytest.raises(MalformedCheckpointError, match=f"claims {length} bytes"):
        header_length(struct.pack("<Q", length), 2**64, "x")


def test_length_beyond_the_file() -> None:
    assert header_length(struct.pack("<Q", 92), 100, "x") == 92
    with pytest.raises(MalformedCheckpointError, match="claims 93 bytes, the whole file has 100; the file is cut"):
        header_length(struct.pack("<Q", 93), 100, "x")


def test_every_truncation_of_a_file_is_noticed(tmp_path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        with pytest.raises(MalformedCheckpointError):
            read_header(tmp_path / "x.safetensors")


def test_hostile_names_are_printed_tamely(tmp_path) -> None:
    path = file_with(tmp_path, {"\x1b[2J" + "n" * 5000: 1})
    with pytest.raises(MalformedCheckpointError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


def test_not_a_regular_file(tmp_path) -> None:
    with pytest.raises(MalformedCheckpointError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(MalformedCheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")
    with pytest.raises(InputNotFoundError, match="no such file"):
        read_header(tmp_path / "none.safetensors")


def test_what_cannot_be_written_is_refused() -> None:
    byte = DTYPES["U8"]
    for name, message in [("__metadata__", "reserved"), ("\ud800", "Unicode")]:
        with pytest.raises(UsageError, match=message):
            build_header([(name, byte, (1,))], {})
    with pytest.raises(UsageError, match="twice"):
        build_header([("x", byte, (1,)), ("x", byte, (2,))], {})
    with pytest.raises(MalformedCheckpointError, match="smaller shards"):
        build_header([("x", byte, (1,))], {"note": "n" * MAX_HEADER_BYTES})
