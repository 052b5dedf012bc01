"""Which files travel with the weights, and the sha256 of files."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.side_files import is_tokenizer_file, side_files, sort_files
from mergekit_px.errors import InputError, InputNotFoundError

TRAVEL = [
    "LICENSE",
    "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
    "chat_template.jinja",
    "generation_config.json",
    "modeling_custom.py",
    "code/deep/layers.py",
    "qwen.tiktoken",
    "scheduler/scheduler_config.json",
    "sub/README.md",
    "tokenizer.json",
]
STAY = {
    "config.json": None,
    "README.md": None,
    "model.safetensors": "merged",
    "model.fp16.safetensors": "not chosen",
    "pytorch_model.bin.index.json": "not chosen",
    "flax_model.msgpack": "not chosen",
    "onnx/tokenizer.json": "weights of its own",
    "onnx/model.onnx": "weights of its own",
    "optimizer.pt": "training",
    "training_args.bin": "training",
    "trainer_state.json": "training",
    "checkpoint-500/config.json": "training",
    "runs/events": "training",
    ".git/config": "hidden",
    ".gitattributes": "hidden",
    "__pycache__/modeling_custom.pyc": "hidden",
    "model.safetensors.aria2": "unfinished",
}


def test_everything_travels_but_weights_and_what_training_left() -> None:
    sizes = dict.fromkeys([*TRAVEL, *STAY], 10) | {"corpus.txt": 300_000_000}
    found = sort_files(sizes, ["model.safetensors"])
    assert found.carried == tuple(sorted(TRAVEL))
    for name, why in STAY.items():
        place = name if name in found.left_behind else f"{name.split('/')[0]}/"
        assert why is None or why in found.left_behind[place]
    assert set(found.unexpected) == {"corpus.txt", "model.safetensors.aria2", "onnx/"}


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "qwen.tiktoken", "tokenizer/x.json", "spiece.model"])
def test_tokenizers_under_any_name(name: str) -> None:
    assert is_tokenizer_file(name)


@pytest.mark.parametrize("name", ["LICENSE", "modeling_tokens.py", "audio_tokenizer_config.json", "generation.json"])
def test_what_is_no_tokenizer(name: str) -> None:
    assert not is_tokenizer_file(name)


def test_links_are_followed_within_the_folder_only(tmp_path) -> None:
    home = tmp_path / "model"
    home.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (home / "vocab.txt").write_text("a")
    (home / "spiece.model").symlink_to("vocab.txt")
    (home / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (home / "folder").symlink_to(tmp_path)
    (home / "gone.json").symlink_to("nowhere")
    found = side_files(home)
    assert found.carried == ("spiece.model", "vocab.txt")
    assert set(found.unexpected) == {"tokenizer.json", "folder/", "gone.json"}


def test_files_of_the_hub_cache_are_links_to_its_blobs(tmp_path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert side_files(snapshot).carried == ("tokenizer.json",)


def test_pointers_of_git_lfs_are_not_taken_for_the_file(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert side_files(tmp_path).carried == ()
    assert "git-lfs" in side_files(tmp_path).unexpected["tokenizer.json"]


def test_sha256_of_a_file(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    expected = hashlib.sha256(b"abc" * 1000).hexdigest()
    assert file_sha256(tmp_path / "x") == expected
    (tmp_path / "link").symlink_to("x")
    assert file_sha256(tmp_path / "link") == expected
    with pytest.raises(InputNotFoundError):
        file_sha256(tmp_path / "y")
    with pytest.raises(InputError, match="not a regular file"):
        file_sha256(tmp_path)


def test_names_of_blobs_are_not_taken_for_their_hashes(tmp_path) -> None:
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_sha256(tmp_path / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()
    blob.unlink()
    with pytest.raises(InputNotFoundError):
        file_sha256(tmp_path / "model.safetensors")


def test_a_remembered_hash_is_of_the_same_bytes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mergekit_px.checkpoint.hashing._WORTH_REMEMBERING", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mergekit_px.checkpoint.hashing._SETTLED", 0.0)
    file = tmp_path / "x"
    file.write_bytes(b"old bytes")
    times = file.stat()
    old = file_sha256(file)
    store = tmp_path / "cache" / "pxmerge" / "sha256.json"
    store.write_text(store.read_text().replace(old, "0" * 64))
    assert file_sha256(file) == "0" * 64, "the file was read though its hash is remembered"
    assert file_sha256(file, remember=False) == old
    time.sleep(0.02)
    file.write_bytes(b"new bytes")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # a program that keeps the time of the file
    assert file_sha256(file) == hashlib.sha256(b"new bytes").hexdigest()
