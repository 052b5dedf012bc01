from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mergekit_px.checkpoint.destination import LOCK_FILE
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError
from mergekit_px.inspection.verify import verify

CONTENTS = {"model.safetensors": b"weights", "config.json": b"{}", "templates/a.jinja": b"text"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {}
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / LOCK_FILE).write_text(json.dumps({"files": files}))
    return tmp_path


def test_an_intact_folder(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("aside")
    found = verify(folder, lambda *state: seen.append(state))
    assert found.is_intact
    assert set(found.matching) == set(CONTENTS)
    total = sum(map(len, CONTENTS.values()))
    assert seen[-1] == (total, total)


def test_every_difference_is_listed(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"Weights")
    (folder / "config.json").unlink()
    (folder / "more.txt").write_text("")
    found = verify(folder)
    assert not found.is_intact
    assert found.changed == ("model.safetensors",)
    assert found.missing == ("config.json",)
    assert found.extra == ("more.txt",)
    assert found.matching == ("templates/a.jinja",)


@pytest.mark.parametrize("content", [b"weights and more", b"weight", b""])
def test_a_file_of_another_length_is_changed(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert verify(folder).changed == ("model.safetensors",)


def test_the_bytes_count_and_not_the_name_of_a_link(folder: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    (folder / "model.safetensors").unlink()
    (folder / ".blobs").mkdir()
    (folder / ".blobs" / digest).write_bytes(b"forgery")
    (folder / "model.safetensors").symlink_to(folder / ".blobs" / digest)
    assert verify(folder).changed == ("model.safetensors",)


def test_without_a_lock_file_nothing_can_be_said(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"no pxmerge\.lock\.json"):
        verify(tmp_path)
    with pytest.raises(InputNotFoundError, match="no such folder"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("{", "JSON"),
        ("{}", "no files"),
        ('{"files": []}', "no files"),
        ('{"files": {"../x": {"sha256": ""}}}', "not a path inside"),
        ('{"files": {"/etc/passwd": {"sha256": ""}}}', "not a path inside"),
        ('{"files": {"x": {"size": 1}}}', "no sha256"),
        ('{"files": {"x": 1}}', "no sha256"),
    ],
)
def test_a_lock_file_that_cannot_be_meant_is_refused(folder: Path, lock: str, message: str) -> None:
    (folder / LOCK_FILE).write_text(lock)
    with pytest.raises(MalformedCheckpointError, match=message):
        verify(folder)
