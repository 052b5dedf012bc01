"""Disks that are full, read-only or broken: one clear error, nothing published, and a way to go on."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from output_sample import PLAN, SIDE_FILES, expected_files, files_in, pieces, sample_layout

from mergekit_px.checkpoint import positional
from mergekit_px.checkpoint.destination import check_space
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import DiskSpaceError, OutputError, WriteError

LAYOUT = sample_layout(scale=20)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs on ``folder``; skips where this user may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "pxmerge-test", str(folder)]
    try:
        allowed = sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def finish(folder: Path) -> None:
    with CheckpointWriter(folder, LAYOUT, PLAN, mode="resume") as writer:
        for name, start, data in pieces(LAYOUT, 5000):
            if not writer.done(name, start, start + len(data)):
                writer.write(name, start, memoryview(data))
        writer.publish(SIDE_FILES)
    assert files_in(folder) == expected_files(LAYOUT) | SIDE_FILES


def test_too_small_a_disk_is_refused_before_the_work(tmp_path) -> None:
    with mounted(tmp_path / "small", "size=256k") as small:
        with pytest.raises(DiskSpaceError, match=r"needs 1,\d{3},\d{3} more bytes of disk, \d+,\d+ are free"):
            CheckpointWriter(small / "out", LAYOUT, PLAN, mode="new")
        assert list(small.iterdir()) == []
        with pytest.raises(DiskSpaceError):
            check_space(small / "not" / "made" / "yet", 300_000)
        check_space(small, 200_000)


def test_disk_full_in_mid_write(tmp_path, monkeypatch) -> None:
    # Without reservation, as on file systems that cannot reserve: the disk fills up while the run writes.
    monkeypatch.setattr(positional, "allocate", lambda descriptor, size: os.ftruncate(descriptor, size))
    with mounted(tmp_path / "small", "size=2m") as small:
        writer = CheckpointWriter(small / "out", LAYOUT, PLAN, mode="new")
        (small / "ballast").write_bytes(bytes(1_200_000))
        with pytest.raises(WriteError, match=r"out/.*model-.*No space left.*nothing of it was published.*--resume"):
            for name, start, data in pieces(LAYOUT, 5000):
                writer.write(name, start, memoryview(data))
        writer.close()
        assert all(path.suffix == ".part" or path.name == ".pxmerge" for path in (small / "out").iterdir())
        with pytest.raises(DiskSpaceError):
            CheckpointWriter(small / "out", LAYOUT, PLAN, mode="resume")
        (small / "ballast").unlink()
        finish(small / "out")


def test_reserved_space_cannot_be_taken_by_others(tmp_path) -> None:
    with mounted(tmp_path / "small", "size=2m") as small:
        with CheckpointWriter(small / "out", LAYOUT, PLAN, mode="new") as writer:
            with pytest.raises(OSError, match="No space left"):
                (small / "greedy").write_bytes(bytes(1 << 21))
            (small / "greedy").unlink()
            for name, start, data in pieces(LAYOUT, 5000):
                writer.write(name, start, memoryview(data))
            writer.publish(SIDE_FILES)
        assert files_in(small / "out") == expected_files(LAYOUT) | SIDE_FILES


def test_disk_full_while_side_files_are_copied(tmp_path) -> None:
    with mounted(tmp_path / "small", "size=2m") as small:
        writer = CheckpointWriter(small / "out", LAYOUT, PLAN, mode="new")
        for name, start, data in pieces(LAYOUT, 5000):
            writer.write(name, start, memoryview(data))
        with pytest.raises(WriteError, match=r"No space left.*nothing of it was published.*--resume"):
            writer.publish({"tokenizer.json": bytes(2 << 20), "config.json": b"{}"})
        writer.close()
        assert not (small / "out" / "config.json").exists()
        finish(small / "out")


def test_read_only_disk(tmp_path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        (disk / "there").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for place in (disk / "out", disk / "there"):
            with pytest.raises(OutputError, match="cannot be used: Read-only file system; choose another with -o"):
                CheckpointWriter(place, LAYOUT, PLAN, mode="new")


def test_limit_on_file_size(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="new")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(WriteError, match=r"File too large.*--resume"):
            for name, start, data in pieces(LAYOUT, 5000):
                writer.write(name, start, memoryview(data))
        with pytest.raises(OutputError, match=r"File too large; raise the limit on files \(ulimit -f\)"):
            CheckpointWriter(tmp_path / "another", LAYOUT, PLAN, mode="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    assert not (tmp_path / "another").exists()
    finish(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_failing_journal_is_a_failing_write(tmp_path, monkeypatch, code) -> None:
    writer = CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="new")
    first, second, *_ = pieces(LAYOUT, 5000)
    writer.write(first[0], first[1], memoryview(first[2]))

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(WriteError, match=os.strerror(code)):
            writer.write(second[0], second[1], memoryview(second[2]))
    assert not writer.done(second[0], second[1], second[1] + len(second[2]))
    writer.close()
    finish(tmp_path)


@pytest.mark.parametrize("where", ["background", "end"])
def test_a_failing_sync_is_not_swallowed(tmp_path, monkeypatch, where) -> None:
    from mergekit_px.checkpoint import background

    if where == "background":
        monkeypatch.setattr(background, "_FLUSH_EVERY", 1)
    writer = CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="new")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(positional, "sync", refuse)
        with pytest.raises(WriteError, match="Input/output error"):
            for name, start, data in pieces(LAYOUT, 5000):
                writer.write(name, start, memoryview(data))
            writer.publish(SIDE_FILES)
        writer.close()
    assert not (tmp_path / "config.json").exists()
    finish(tmp_path)
