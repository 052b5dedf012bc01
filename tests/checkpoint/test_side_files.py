"""Which files travel with the weights, and the sha256 of files."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.side_files import CARRIED, CODE, TOKENIZER_FILES, is_side_file, side_files
from mergekit_px.errors import InputError, InputNotFoundError

TRAVEL = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
STAY = [
    "config.json",
    "README.md",
    "modeling_custom.py",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "training_args.bin",
    "sub/tokenizer.json",
    "additional_chat_templates/readme.txt",
    "Tokenizer.JSON",
    "old-tokenizer.json",
]


def test_names() -> None:
    assert [name for name in TRAVEL if not is_side_file(name)] == []
    assert [name for name in STAY if is_side_file(name)] == []
    assert is_side_file("modeling_custom.py", CODE) and not is_side_file("sub/x.py", CODE)
    assert set(TOKENIZER_FILES) < set(CARRIED)
    assert is_side_file("merges.txt", TOKENIZER_FILES) and not is_side_file("LICENSE", TOKENIZER_FILES)


def test_files_of_a_folder(tmp_path) -> None:
    for name in TRAVEL + STAY:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "COPYING").mkdir()
    (tmp_path / "spiece.model").symlink_to(tmp_path / "vocab.txt")
    (tmp_path / "tekken.json").symlink_to(tmp_path / "nowhere")
    assert side_files(tmp_path) == tuple(sorted([*TRAVEL, "spiece.model"]))
    assert side_files(tmp_path, CODE) == ("modeling_custom.py",)


def test_sha256_of_a_file(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    expected = hashlib.sha256(b"abc" * 1000).hexdigest()
    assert file_sha256(tmp_path / "x") == expected
    (tmp_path / "link").symlink_to("x")
    assert file_sha256(tmp_path / "link") == expected
    with pytest.raises(InputNotFoundError):
        file_sha256(tmp_path / "y")
    with pytest.raises(InputError, match="cannot be read"):
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
