"""Files that are no safetensors files are named as what they are."""

from __future__ import annotations

import pytest
import torch

from mergekit_px.checkpoint.file_kind import kind_of_bytes
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError
from mergekit_px.testing import write_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (POINTER, "git-lfs"),
        (b"\xef\xbb\xbf" + POINTER.replace(b"git-lfs.github", b"hawser.github"), "git-lfs"),
        (b"/annex/objects/SHA256E-s3--abc.safetensors\n", "git-annex"),
        (b"tjgg" + bytes(60), "GGML"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "Zstandard"),
        (b"config.json".ljust(257, b"\0") + b"ustar\0" + bytes(250), "tar archive"),
        (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF"),
        (b"<!DOCTYPE html><html><body>Log in", "web page"),
        (b"\n  <html>", "web page"),
        (b"Entry not found", "Entry not found"),
        (b"", "empty"),
        (b"\0" * 512, "zeros"),
        (b"PK\x03\x04" + b"\0" * 26 + b"weights.npy", "zip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)
def test_a_file_is_named_as_what_it_is(tmp_path, first: bytes, named: str) -> None:
    for path in (tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        path.write_bytes(first)
        with pytest.raises(MalformedCheckpointError) as caught:
            open_checkpoint(path, allow_pickle=True)
        assert named in str(caught.value)
    with pytest.raises(MalformedCheckpointError, match="not a safetensors file"):
        open_checkpoint(tmp_path)


def test_a_pickle_under_another_name_is_read_once_it_has_its_own(tmp_path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="PyTorch pickle") as caught:
        open_checkpoint(tmp_path)
    assert "rename it to .bin" in (caught.value.hint or "")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    assert list(open_checkpoint(tmp_path, allow_pickle=True).tensors) == ["w"]


def test_binary_headers_are_left_to_the_parser() -> None:
    assert kind_of_bytes((64).to_bytes(8, "little") + b'{"w":{}}') is None


def test_a_folder_without_weights_says_what_it_holds(tmp_path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(InputNotFoundError, match="GGUF"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.incomplete").touch()
    with pytest.raises(InputNotFoundError, match="unfinished"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_a_pointer_is_named(tmp_path, name: str) -> None:
    write_checkpoint(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, config={}, shards=2)
    (tmp_path / "m" / name).write_bytes(POINTER)
    with pytest.raises(MalformedCheckpointError, match=r"this is a git-lfs pointer.*git lfs pull"):
        open_checkpoint(tmp_path / "m")
