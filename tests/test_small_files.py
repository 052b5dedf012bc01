"""Small files of strangers: what is not a plain file of a sensible size inside its folder is refused, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mergekit_px.checkpoint.json_text import MAX_DEPTH, parse_object, read_object
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError
from mergekit_px.small_files import read_small_file

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")


def test_reads_a_plain_file_and_a_link_within_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to("real.json")
    assert read_small_file(tmp_path / "config.json", folder=tmp_path) == b"{}"


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(MalformedCheckpointError, match="not a regular file"):
            read_small_file(tmp_path / name)


def test_the_size_is_capped_and_the_cap_is_named(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * 11)
    with pytest.raises(MalformedCheckpointError, match="more than the 10 bytes"):
        read_small_file(tmp_path / "large", limit=10)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_bytes(b'{"secret": 1}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret.json")
    with pytest.raises(MalformedCheckpointError, match="leads out of its folder"):
        read_small_file(folder / "config.json", folder=folder)
    assert read_small_file(folder / "config.json")  # a path that the user named himself


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert read_small_file(snapshot / "config.json", folder=snapshot) == b"{}"


def test_missing_files_and_dangling_links_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such file"):
        read_small_file(tmp_path / "none")
    (tmp_path / "dangling").symlink_to("gone")
    with pytest.raises(InputNotFoundError, match="a link to a file that is not there"):
        read_small_file(tmp_path / "dangling")


@pytest.mark.parametrize("levels", [MAX_DEPTH, 700, 100_000])
@pytest.mark.parametrize("strict", [True, False])
def test_deep_json_is_refused(tmp_path: Path, levels: int, strict: bool) -> None:
    (tmp_path / "deep.json").write_text('{"a":' + "[" * levels + "]" * levels + "}")
    with pytest.raises(MalformedCheckpointError, match="nested"):
        read_object(tmp_path / "deep.json", strict=strict)


def test_json_as_deep_as_allowed_is_read() -> None:
    inner = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert parse_object(f'{{"a":{inner}}}', "here") == json.loads(f'{{"a":{inner}}}')
