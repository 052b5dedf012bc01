"""Bytes that wait to be hashed: in any order in, in the order of the file out, never more than there is room for."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from mergekit_px.checkpoint import held
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.held import Held


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_PATIENCE", 0.01)
    monkeypatch.setattr(held, "ROOM", 1000)


def test_pieces_come_out_where_they_were_put() -> None:
    waiting = Held()
    waiting.follow("file")
    waiting.put("file", 5, memoryview(b"later"))
    assert waiting.take("file", 0) == (None, 5)
    waiting.put("file", 0, memoryview(b"first"))
    assert waiting.is_due("file", 0) and not waiting.is_due("file", 3)
    assert waiting.take("file", 0) == (b"first", 5)
    assert waiting.take("file", 5) == (b"later", None)
    assert waiting.take("file", 10) == (None, None)


def test_what_nobody_hashes_or_has_hashed_already_is_not_kept() -> None:
    waiting = Held()
    waiting.put("other", 0, memoryview(b"x"))
    waiting.follow("file")
    assert waiting.take("file", 100) == (None, None)
    waiting.put("file", 0, memoryview(b"x"))
    waiting.put("file", 100, memoryview(b"y"))
    waiting.put("file", 100, memoryview(b"y"))
    assert waiting.take("file", 100) == (b"y", None)
    waiting.put("file", 200, memoryview(bytes(1000)))
    waiting.leave("file")
    waiting.put("file", 300, memoryview(b"x"))
    waiting.follow("next")
    waiting.put("next", 0, memoryview(bytes(1000)))
    assert waiting.take("next", 0) == (bytes(1000), None), "all room was given back"


def test_pieces_that_were_passed_give_their_room_back() -> None:
    waiting = Held()
    waiting.follow("file")
    waiting.put("file", 0, memoryview(bytes(1000)))
    assert waiting.take("file", 500) == (None, None)
    waiting.put("file", 500, memoryview(bytes(1000)))
    assert waiting.take("file", 500)[0] == bytes(1000)


def test_without_room_hashing_is_told_to_read_for_itself_and_writers_wait_no_more() -> None:
    waiting = Held()
    waiting.follow("file")
    waiting.put("file", 2000, memoryview(bytes(900)))
    assert not waiting.is_due("file", 0)
    for place in range(3000, 9000, 1000):
        waiting.put("file", place, memoryview(bytes(900)))
    assert waiting.is_due("file", 0)
    assert waiting.take("file", 0) == (None, 2000)
    assert waiting.take("file", 2000) == (bytes(900), None)
    assert not waiting.is_due("file", 2900)


@pytest.mark.parametrize("room", [0, 3000, 1 << 20])
def test_the_hash_is_that_of_the_file_whatever_is_kept_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(held, "ROOM", room)
    path = tmp_path / "file"
    path.write_bytes(data := random.Random(0).randbytes(100_000))
    waiting = Held()
    waiting.follow("file")
    places = list(range(0, len(data), 700))
    random.Random(1).shuffle(places)

    def read() -> None:
        for place in places[: len(places) * 3 // 4]:
            waiting.put("file", place, memoryview(data[place : place + 700]))

    reader = threading.Thread(target=read)
    reader.start()
    digest = file_sha256(path, remember=False, taken=lambda place: waiting.take("file", place))
    reader.join()
    assert digest == hashlib.sha256(data).hexdigest()
