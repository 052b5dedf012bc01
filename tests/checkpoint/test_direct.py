"""Reading and writing past the page cache: the same bytes, at any place and of any length."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergekit_px.checkpoint import direct, held, positional
from mergekit_px.checkpoint.direct import BLOCK, PIECE, WORTHWHILE, DirectAccess
from mergekit_px.checkpoint.positional import open_positional
from mergekit_px.cli import main
from mergekit_px.execute import run
from mergekit_px.plan import budget
from tests.folders import contents, write_llamas

SIZE = 3 * PIECE + 12345
RANGES = [
    (0, SIZE),
    (1, SIZE - 2),
    (BLOCK, WORTHWHILE),
    (BLOCK - 1, WORTHWHILE + BLOCK + 2),
    (7, 100),
    (PIECE - 5, PIECE + 10),
    (SIZE - WORTHWHILE - 3, WORTHWHILE + 3),
]


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file system of the tests is."""
    monkeypatch.setattr(direct, "_file_system", lambda descriptor: "ext4")


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_a_file_in_the_page_cache_is_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_file_system", lambda descriptor: "ext4")
    monkeypatch.setattr(direct, "_is_cached", lambda descriptor: True)
    path = tmp_path / "numbers"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file:
        assert DirectAccess.to(file.fileno(), writable=False) is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_is_what_is_there(tmp_path: Path, cached: bool) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(data := random.Random(0).randbytes(SIZE))
    file = open_positional(path, direct=True)
    for start, size in RANGES:
        if not cached:
            drop_from_cache(path)
        buffer = bytearray(size)
        assert file.read_into(start, memoryview(buffer)) == size
        assert buffer == data[start : start + size]
    past = bytearray(2 * WORTHWHILE)
    assert file.read_into(SIZE - WORTHWHILE, memoryview(past)) == WORTHWHILE
    assert file.read_into(SIZE, memoryview(past)) == 0
    file.close()


@pytest.mark.usefixtures("anywhere")
def test_what_is_written_is_what_was_given(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    expected = bytearray(SIZE)
    file = open_positional(path, create=True, direct=True)
    file.allocate(SIZE)
    for seed, (start, size) in enumerate([*RANGES, *RANGES[::-1]]):
        data = random.Random(seed).randbytes(size)
        file.write(start, memoryview(data))
        expected[start : start + size] = data
        whole = bytearray(SIZE)
        assert file.read_into(0, memoryview(whole)) == SIZE
        assert whole == expected
    file.close()
    assert path.read_bytes() == expected


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_file_system_that_refuses_is_served_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "numbers"
    usual, refused = getattr(os, call), []

    def refuse(descriptor: int, buffers: Any, *rest: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(rest)
            raise OSError(errno.EINVAL, "not here")
        result: int = usual(descriptor, buffers, *rest)
        return result

    data = random.Random(1).randbytes(SIZE)
    path.write_bytes(data[::-1])
    monkeypatch.setattr(os, call, refuse)
    file = open_positional(path, writable=True, direct=True)
    file.write(0, memoryview(data))
    drop_from_cache(path)
    back = bytearray(SIZE)
    assert file.read_into(0, memoryview(back)) == SIZE
    file.close()
    assert back == data
    assert refused or DirectAccess.to(os.open(path, os.O_RDONLY), writable=False) is None


def test_file_systems_that_were_not_tried_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_file_system", lambda descriptor: "nfs4")
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with path.open("rb") as file:
        assert DirectAccess.to(file.fileno(), writable=False) is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("room", [0, 1 << 20, 64 << 20])
@pytest.mark.parametrize("method", ["linear", "tsv-m"])
def test_a_merge_past_the_page_cache_has_the_same_bytes_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, room: int
) -> None:
    write_llamas(tmp_path, "math", "code")
    line = [method, "--sources", str(tmp_path / "math"), str(tmp_path / "code")]
    line += ["--base", str(tmp_path / "base")] if method == "tsv-m" else []
    line += ["-o", str(tmp_path / "merged"), "-q"]
    assert main(line) == 0
    usual = contents(tmp_path / "merged")
    shutil.rmtree(tmp_path / "merged")
    monkeypatch.setattr(budget, "PAST_CACHE", 0)
    monkeypatch.setattr(held, "ROOM", room)
    monkeypatch.setattr(held, "_PATIENCE", 0.01)
    monkeypatch.setattr(direct, "WORTHWHILE", 4096)
    monkeypatch.setattr(positional, "WORTHWHILE", 4096)
    monkeypatch.setattr(run, "available_memory", lambda: 0)
    assert main(line) == 0
    assert contents(tmp_path / "merged") == usual
    assert main(["verify", str(tmp_path / "merged"), "-q"]) == 0
