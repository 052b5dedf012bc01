"""Which folders and files are checkpoints, what they say, and every way in which they are refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.checkpoint.header import parse_header, read_raw_header
from mergekit_px.checkpoint.open import checkpoint_from_headers, open_checkpoint
from mergekit_px.checkpoint.side_files import SideFiles
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError

A = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.bfloat16)}
B = {"b.weight": torch.full((4,), 2.0)}


def save(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata or None)


def sharded(folder: Path, weight_map: object = None, *, index: object = None) -> Path:
    save(folder / "model-00001-of-00002.safetensors", A, format="pt")
    save(folder / "model-00002-of-00002.safetensors", B, format="pt", note="last")
    if weight_map is None:
        weight_map = {name: "model-00001-of-00002.safetensors" for name in A}
        weight_map |= {name: "model-00002-of-00002.safetensors" for name in B}
    document = {"metadata": {"total_size": 1}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return folder


def test_single_file_folder(tmp_path) -> None:
    save(tmp_path / "model.safetensors", A | B, format="pt")
    save(tmp_path / "consolidated.safetensors", A)
    (tmp_path / "config.json").write_text('{"model_type": "tiny", "limit": [0.0, Infinity]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.label == str(tmp_path) and checkpoint.directory == tmp_path
    assert list(checkpoint.files) == ["model.safetensors"] and set(checkpoint.tensors) == {*A, *B}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.config == {"model_type": "tiny", "limit": [0.0, float("inf")]}
    assert checkpoint.side_files == ("tokenizer.json",)
    weight = checkpoint.tensors["a.weight"]
    assert (weight.dtype.name, weight.shape, weight.nbytes, weight.elements) == ("F32", (2, 3), 24, 6)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert raw[weight.offset : weight.offset + 24] == A["a.weight"].numpy().tobytes()
    length = int.from_bytes(raw[:8], "little")
    file = checkpoint.files["model.safetensors"]
    assert file.size == len(raw) and file.header_sha256 == hashlib.sha256(raw[8 : 8 + length]).hexdigest()
    assert checkpoint.nbytes == len(raw) - 8 - length


def test_one_file_is_taken_without_its_neighbours(tmp_path) -> None:
    sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path / "model-00001-of-00002.safetensors"), label="math")
    assert checkpoint.label == "math" and checkpoint.config is None and checkpoint.side_files == ()
    assert set(checkpoint.tensors) == set(A)


def test_sharded_folder(tmp_path) -> None:
    save(sharded(tmp_path) / "consolidated.safetensors", A)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    # In the order of the bytes: the widest dtype of each file comes first.
    assert list(checkpoint.tensors) == ["a.weight", "a.bias", "b.weight"]
    assert checkpoint.tensors["b.weight"].file == "model-00002-of-00002.safetensors"
    assert checkpoint.metadata == {"format": "pt", "note": "last"}
    assert checkpoint.config is None


def test_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "m" / "model.safetensors", A)
    assert open_checkpoint("~/m").directory == tmp_path / "m"


def test_shards_behind_symlinks_as_in_the_hub_cache(tmp_path) -> None:
    sharded(tmp_path / "real")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in [path.name for path in (tmp_path / "real").iterdir()]:
        blob = tmp_path / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        (tmp_path / "real" / name).rename(blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    assert set(open_checkpoint(snapshot).tensors) == {*A, *B}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_folders_of_other_names(tmp_path, name) -> None:
    save(tmp_path / name, A)
    assert list(open_checkpoint(tmp_path).files) == [name]


def test_adapter_beside_other_files(tmp_path) -> None:
    save(tmp_path / "adapter_model.safetensors", A)
    save(tmp_path / "extra.safetensors", A)
    assert list(open_checkpoint(tmp_path).files) == ["adapter_model.safetensors"]


def test_index_of_another_name(tmp_path) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").rename(folder / "unet.safetensors.index.json")
    save(folder / "other.safetensors", A)
    assert set(open_checkpoint(folder).tensors) == {*A, *B}


def test_several_files_without_index(tmp_path) -> None:
    save(tmp_path / "one.safetensors", A)
    save(tmp_path / "two.safetensors", B)
    assert set(open_checkpoint(tmp_path).tensors) == {*A, *B}
    save(tmp_path / "three.safetensors", B)
    with pytest.raises(InputError, match=r"b\.weight is both in three\.safetensors and in two\.safetensors"):
        open_checkpoint(tmp_path)


def test_model_file_and_index_of_others_is_ambiguous(tmp_path) -> None:
    save(sharded(tmp_path) / "model.safetensors", A)
    with pytest.raises(InputError, match="which weights are meant is open"):
        open_checkpoint(tmp_path)


def test_index_that_names_the_one_file(tmp_path) -> None:
    save(tmp_path / "model.safetensors", B)
    index = {"weight_map": {"b.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path).tensors) == set(B)


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {"a.weight": SHARD_1, "a.bias": SHARD_1, "b.weight": SHARD_2}
BAD_MAPS = {
    "missing shard": (GOOD | {"c": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.* is missing"),
    "parent": (GOOD | {"c": "../x.safetensors"}, "not a plain path inside the folder"),
    "parent inside": (GOOD | {"c": f"sub/../{SHARD_1}"}, "not a plain path"),
    "absolute": (GOOD | {"c": "/etc/passwd"}, "not a plain path"),
    "backslash": (GOOD | {"c": "..\\x.safetensors"}, "not a plain path"),
    "drive": (GOOD | {"c": "C:x.safetensors"}, "not a plain path"),
    "empty": (GOOD | {"c": ""}, "not a plain path"),
    "dot": (GOOD | {"c": "."}, "not a plain path"),
    "nul": (GOOD | {"c": "x\0.safetensors"}, "not a plain path"),
    "double slash": (GOOD | {"c": "sub//x.safetensors"}, "not a plain path"),
    "not a string": (GOOD | {"c": 3}, "the file of c is not a string"),
    "not in the shard": (GOOD | {"c": SHARD_1}, "places c in model-00001.* which does not hold it"),
    "wrong shard": (GOOD | {"b.weight": SHARD_1}, "places b.weight in model-00001.* which does not hold it"),
    "not in the index": (
        {"a.weight": SHARD_1, "b.weight": SHARD_2},
        "00001.* holds a.bias, which the index does not place there",
    ),
    "list": ([], "no 'weight_map' object"),
    "folder": (GOOD | {"c": "sub"}, "not a regular file"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_indices(tmp_path, case) -> None:
    weight_map, message = BAD_MAPS[case]
    (tmp_path / "sub").mkdir()
    sharded(tmp_path, weight_map)
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "not an object"),
        (b"{}", "no 'weight_map' object"),
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"weight_map":' + b"[" * 100_000, "nested too deeply"),
        (b'{"weight_map":{"a":"x","a":"y"}}', "the key a occurs twice"),
    ],
)
def test_bad_index_texts(tmp_path, text, message) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(MalformedCheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_damaged_shard_is_named(tmp_path) -> None:
    shard = sharded(tmp_path) / SHARD_2
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MalformedCheckpointError, match=f"{SHARD_2}: b.weight: .*cut short"):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputNotFoundError, match="holds no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "link")
    with pytest.raises(InputError, match="x: "):
        open_checkpoint("x\0y", label="x")


def test_not_weights(tmp_path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(MalformedCheckpointError, match="not a regular file"):
            open_checkpoint(path)
    (tmp_path / "notes.txt").write_text("hello, this is some text")
    with pytest.raises(MalformedCheckpointError, match="not a safetensors file"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="an index, not weights; give its folder"):
        open_checkpoint(sharded(tmp_path / "s") / "model.safetensors.index.json")


@pytest.mark.parametrize(("text", "message"), [("[1]", "not an object"), ("{", "not valid JSON")])
def test_bad_config(tmp_path, text, message) -> None:
    save(tmp_path / "model.safetensors", A)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MalformedCheckpointError, match=f"config.json: .*{message}"):
        open_checkpoint(tmp_path)


def test_an_empty_file_is_a_checkpoint_without_tensors(tmp_path) -> None:
    save(tmp_path / "model.safetensors", {})
    assert open_checkpoint(tmp_path).tensors == {}


def test_from_headers_alone(tmp_path) -> None:
    folder = sharded(tmp_path)
    headers, sizes, hashes = {}, {}, {}
    for name in (SHARD_1, SHARD_2):
        raw, identity = read_raw_header(folder / name)
        sizes[name] = identity.size
        headers[name] = parse_header(raw, sizes[name], name)
        hashes[name] = hashlib.sha256(raw).hexdigest()
    index = (folder / "model.safetensors.index.json").read_bytes()
    remote = checkpoint_from_headers("org/name", headers, sizes, hashes, index, {"a": 1}, SideFiles(("merges.txt",)))
    local = open_checkpoint(folder)
    assert remote.tensors == local.tensors and remote.files == local.files
    assert (remote.directory, remote.config, remote.side_files) == (None, {"a": 1}, ("merges.txt",))
    del headers[SHARD_2]
    with pytest.raises(MalformedCheckpointError, match=f"org/name/.*{SHARD_2}, which is missing"):
        checkpoint_from_headers("org/name", headers, sizes, hashes, index, None, SideFiles())
