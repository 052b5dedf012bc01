"""Folders of several files that are published together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_px.checkpoint.destination import check_apart
from mergekit_px.checkpoint.publish import new_folder
from mergekit_px.errors import OutputError, OutputLockedError

CHILD = """
import os, signal, sys
from pathlib import Path
from mergekit_px.checkpoint.publish import new_folder
output, version, kill_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0

def counting(function):
    def call(*args, **named):
        global count
        count += 1
        if count > kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)
    return call

def write():
    with new_folder(output, overwrite=True) as staged:
        for name in ("config.json", "weights", "only-" + version):
            (staged / name).write_text(version)

for name in ("open", "replace", "unlink", "mkdir", "rmdir", "fsync", "fdatasync", "ftruncate"):
    setattr(os, name, counting(getattr(os, name)))
write()
print(count)
"""


def write(folder: Path, version: str, *, overwrite: bool = False) -> None:
    with new_folder(folder, overwrite=overwrite) as staged:
        for name in ("config.json", "weights", f"only-{version}"):
            (staged / name).write_text(version)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def versions(folder: Path) -> set[str]:
    return {text for name, text in contents(folder).items() if name != "pxmerge.lock.json"}


def test_a_folder_lists_its_files_and_is_replaced_by_that_list(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    assert set(json.loads((out / "pxmerge.lock.json").read_text())["files"]) == {"config.json", "weights", "only-old"}
    with pytest.raises(OutputError, match="not empty"):
        write(out, "new")
    (out / "notes").write_text("mine")
    with pytest.raises(OutputError, match="also holds notes"):
        write(out, "new", overwrite=True)
    assert versions(out) == {"old", "mine"}
    (out / "notes").unlink()
    write(out, "new", overwrite=True)
    assert set(contents(out)) == {"config.json", "weights", "only-new", "pxmerge.lock.json"} and versions(out) == {
        "new"
    }
    assert not (out / ".pxmerge").exists()


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_call_of_the_system(tmp_path: Path, old: bool) -> None:
    whole = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "whole"), "new", "9999"], capture_output=True, check=True
    )
    for kill_after in range(0, int(whole.stdout) + (9 if old else 0), 2):
        out = tmp_path / f"out-{kill_after}"
        if old:
            write(out, "old")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(out), "new", str(kill_after)], capture_output=True, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL)
        if out.is_dir():
            assert len(versions(out)) < 2, f"files of two outputs after {kill_after} calls"
            if (out / "pxmerge.lock.json").exists():
                assert {"config.json", "weights"} < set(contents(out))
            elif versions(out):
                assert (out / ".pxmerge" / "journal.jsonl").exists()
                with pytest.raises(OutputError, match="--overwrite"):
                    write(out, "new")
        write(out, "newer", overwrite=True)
        assert versions(out) == {"newer"} and not (out / ".pxmerge").exists()


def test_what_fails_leaves_the_older_folder_and_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no"), new_folder(out, overwrite=False) as staged:
        (staged / "config.json").write_text("new")
        raise ValueError("no")
    assert not out.exists()
    write(out, "old")
    before = contents(out)
    with pytest.raises(ValueError, match="no"), new_folder(out, overwrite=True) as staged:
        (staged / "config.json").write_text("new")
        raise ValueError("no")
    assert contents(out) == before and not (out / ".pxmerge").exists()


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, overwrite=False) as staged:
        (staged / "config.json").write_text("first")
        with pytest.raises(OutputLockedError, match=str(os.getpid())):
            write(out, "second", overwrite=True)
    assert versions(out) == {"first"} and not (out / ".pxmerge").exists()


def test_outputs_and_inputs_are_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    (model / "weights").write_text("weights")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "weights").symlink_to(model / "weights")
    for output in (model, tmp_path / "link", model / "new", tmp_path / "link" / "part", tmp_path, model / "weights"):
        with pytest.raises(OutputError, match="inputs are never changed"):
            check_apart(output, [model])
    with pytest.raises(OutputError, match="inputs are never changed"):
        check_apart(model, [tmp_path / "linked"])
    with pytest.raises(OutputError, match="inputs are never changed"):
        check_apart(model, [model / "weights"])
    check_apart(model / "part", [model / "weights"])
    check_apart(tmp_path / "model-2", [model])


def test_links_in_a_circle_are_refused_as_outputs_and_ignored_in_inputs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for folder in (tmp_path, tmp_path / "model"):
        (folder / "one").symlink_to("other")
        (folder / "other").symlink_to("one")
    check_apart(tmp_path / "out", [tmp_path / "model"])
    check_apart(tmp_path / "one", [tmp_path / "model"])
