"""Killed, torn and interrupted runs: what is continued is byte-identical to what was never stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from output_sample import PLAN, SIDE_FILES, expected_files, files_in, pieces, sample_layout

from mergekit_px.checkpoint.destination import output_state
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import InputError, OutputError

LAYOUT = sample_layout()
COMPLETE = expected_files(LAYOUT) | SIDE_FILES
ALL = pieces(LAYOUT)


def child(folder: Path, mode: str, kill_after: int, stop: str = "write") -> tuple[int, int]:
    """Exit status, and how many writes the child had to do."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("output_sample.py")),
        str(folder),
        mode,
        str(kill_after),
        stop,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, int(done.stdout)


def unfinished(folder: Path, count: int = 40) -> Path:
    """Leave a run with ``count`` finished pieces."""
    with CheckpointWriter(folder, LAYOUT, PLAN, mode="new") as writer:
        for name, start, data in ALL[:count]:
            writer.write(name, start, memoryview(data))
    return folder / ".pxmerge" / "journal.jsonl"


def finish(folder: Path, *, piece: int = 1000, mode="resume", portable: bool = False) -> int:
    """Continue a run to its end; how many bytes had to be written."""
    written = 0
    with CheckpointWriter(folder, LAYOUT, PLAN, mode=mode, portable=portable) as writer:
        for name, start, data in pieces(LAYOUT, piece):
            if not writer.done(name, start, start + len(data)):
                writer.write(name, start, memoryview(data))
                written += len(data)
        writer.publish(SIDE_FILES)
    return written


def test_killed_while_writing_again_and_again(tmp_path) -> None:
    todo = len(ALL)
    for kill_after in (1, 30, 25):
        status, had_to_do = child(tmp_path, "resume", kill_after)
        assert status == -signal.SIGKILL and had_to_do == todo
        with pytest.raises(InputError):
            open_checkpoint(tmp_path)
        todo -= kill_after
    status, had_to_do = child(tmp_path, "resume", len(ALL))
    assert (status, had_to_do) == (0, todo)
    assert files_in(tmp_path) == COMPLETE


@pytest.mark.parametrize("renames", range(9))
def test_killed_while_publishing(tmp_path, renames) -> None:
    # The list of names, three shards, then tokenizer, index, config and lock file.
    status, _ = child(tmp_path, "new", renames, "publish")
    if renames >= 8:
        assert status == 0 and files_in(tmp_path) == COMPLETE
        return
    assert status == -signal.SIGKILL
    assert not (tmp_path / "pxmerge.lock.json").exists()
    assert output_state(tmp_path).unfinished is not None
    assert finish(tmp_path) == 0
    assert files_in(tmp_path) == COMPLETE and not (tmp_path / ".pxmerge").exists()


@pytest.mark.parametrize("renames", [1, 2, 4, 6])
def test_killed_while_replacing_an_older_output(tmp_path, renames) -> None:
    older_output(tmp_path)
    status, _ = child(tmp_path, "overwrite", renames, "publish")
    assert status == -signal.SIGKILL
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model-00001-of-00004.safetensors").exists()
    assert finish(tmp_path) == 0
    assert files_in(tmp_path) == COMPLETE and not (tmp_path / "1_Pooling").exists()


@pytest.mark.parametrize("renames", [0, 1, 3, 5])
def test_killed_while_replacing_and_overwritten_again(tmp_path, renames) -> None:
    older_output(tmp_path)
    child(tmp_path, "overwrite", renames, "publish")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="also holds mine"):
        CheckpointWriter(tmp_path, LAYOUT, "plan-2", mode="overwrite")
    (tmp_path / "mine").unlink()
    with CheckpointWriter(tmp_path, LAYOUT, "plan-2", mode="overwrite"):
        pass  # ended before its first byte
    finish(tmp_path, mode="overwrite")
    assert files_in(tmp_path) == COMPLETE and not (tmp_path / ".pxmerge").exists()


def test_overwriting_leaves_folders_alone_that_hold_other_files(tmp_path) -> None:
    old = older_output(tmp_path)
    others = ["deep/er/notes.txt", "modelling.safetensors", "notes.txt", "zzz"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=r"deep/er/notes\.txt, modelling\.safetensors, notes\.txt and 1 more"):
        CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="overwrite")
    assert {name: data for name, data in files_in(tmp_path).items() if name not in others} == old
    (tmp_path / "pxmerge.lock.json").unlink()
    with pytest.raises(OutputError, match="also holds 1_Pooling/config"):
        CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="overwrite")
    assert not (tmp_path / ".pxmerge").exists()


def older_output(folder: Path) -> dict[str, bytes]:
    """An output of an earlier save, split into four."""
    old = {f"model-0000{number}-of-00004.safetensors": b"old" for number in range(1, 5)}
    old |= {"model.safetensors.index.json": b"{}", "config.json": b"{}", "chat_template.jinja": b"old"}
    old |= {"1_Pooling/config.json": b"{}", "tokenizer.json": b"old"}
    for name, data in old.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "pxmerge.lock.json").write_text(json.dumps({"files": {name: {"sha256": ""} for name in old}}))
    return old


def test_overwriting_keeps_the_old_output_whole_until_the_new_one_is(tmp_path) -> None:
    old = older_output(tmp_path)
    status, _ = child(tmp_path, "overwrite", 50)
    assert status == -signal.SIGKILL
    assert {name: data for name, data in files_in(tmp_path).items() if name in old} == old
    # The continued run still knows that it replaces something.
    finish(tmp_path)
    assert files_in(tmp_path) == COMPLETE


def test_overwriting_starts_over(tmp_path) -> None:
    unfinished(tmp_path)
    (tmp_path / ".pxmerge" / "parts" / "model-00007-of-00009.safetensors").write_bytes(b"of another plan")
    assert finish(tmp_path, mode="overwrite") == sum(len(data) for _, _, data in ALL)
    assert files_in(tmp_path) == COMPLETE
    assert finish(tmp_path, mode="overwrite") > 0
    assert files_in(tmp_path) == COMPLETE


@pytest.mark.parametrize("piece", [1, 333, 4096, 10**6])
def test_ranges_may_be_cut_differently(tmp_path, piece) -> None:
    unfinished(tmp_path, 60)
    whole = sum(len(data) for _, _, data in ALL)
    already = sum(len(data) for _, _, data in ALL[:60])
    written = finish(tmp_path, piece=piece)
    assert written == whole - already if piece == 1 else whole - already <= written <= whole
    assert files_in(tmp_path) == COMPLETE


def test_the_portable_way_continues_what_the_other_began(tmp_path) -> None:
    unfinished(tmp_path)
    assert 0 < finish(tmp_path, portable=True) < sum(len(data) for _, _, data in ALL)
    assert files_in(tmp_path) == COMPLETE


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda text: text[:-7], 1),  # torn by the kill
        (lambda text: text[:-1], 0),  # complete but for its end
        (lambda text: text + b'["big", 0', 0),
        (lambda text: text + b"\0" * 4096, 0),  # as some file systems leave it after a power cut
        (lambda text: text + b'["nobody", 0, 5, 1]\n["big", 5, 4, 1]\n["big", 0, 99999999, 1]\n["big"]\n[1]\n7\n', 0),
        (lambda text: text.split(b"\n", 1)[0] + b"\n", 40),
    ],
    ids=["torn", "no newline", "torn extra", "zeros", "nonsense", "head only"],
)
def test_damaged_journals_cost_no_more_than_their_ranges(tmp_path, damage, lost) -> None:
    journal = unfinished(tmp_path)
    journal.write_bytes(damage(journal.read_bytes()))
    expected = sum(len(data) for _, _, data in ALL[40 - lost :])
    # Written in two steps, so that what is appended after the damage is read back as well.
    with CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="resume") as writer:
        assert writer.remaining_bytes == expected
        name, start, data = ALL[-1]
        writer.write(name, start, memoryview(data))
    assert finish(tmp_path) == expected - len(data)
    assert files_in(tmp_path) == COMPLETE


def test_damaged_ranges_are_written_again(tmp_path) -> None:
    unfinished(tmp_path)
    name, start, data = ALL[0]
    number, offset, _ = LAYOUT.location[name]
    with (tmp_path / ".pxmerge" / "parts" / LAYOUT.shards[number].file).open("r+b") as part:
        part.seek(offset + start)
        part.write(bytes([data[0] ^ 1]))
    with CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="resume") as writer:
        assert not writer.done(name, start, start + len(data))
    finish(tmp_path)
    assert files_in(tmp_path) == COMPLETE


@pytest.mark.parametrize("how", ["removed", "cut", "grown", "header"])
def test_damaged_shards(tmp_path, how) -> None:
    unfinished(tmp_path, 100)
    part = tmp_path / ".pxmerge" / "parts" / LAYOUT.shards[0].file
    if how == "removed":
        part.unlink()
    elif how == "cut":
        part.write_bytes(part.read_bytes()[:50])
    elif how == "grown":
        part.write_bytes(part.read_bytes() + b"more")
    else:
        part.write_bytes(b"x" * 8 + part.read_bytes()[8:])
    finish(tmp_path)
    assert files_in(tmp_path) == COMPLETE


def test_another_plan_is_refused(tmp_path) -> None:
    unfinished(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(OutputError, match=r"the unfinished run there has another plan.*--overwrite"):
        CheckpointWriter(tmp_path, LAYOUT, "plan-2", mode="resume")
    with pytest.raises(OutputError, match="an unfinished run is there; continue it with --resume"):
        CheckpointWriter(tmp_path, LAYOUT, PLAN, mode="new")
    assert {name: data for name, data in files_in(tmp_path).items() if "lock" not in name} == {
        name: data for name, data in before.items() if "lock" not in name
    }
    assert output_state(tmp_path).unfinished.plan_hash == PLAN


@pytest.mark.parametrize("head", [b"", b"{}\n", b"[]\n", b'{"pxmerge_journal": 99, "plan": "x", "replaces": false}\n'])
def test_unreadable_journal_head(tmp_path, head) -> None:
    journal = unfinished(tmp_path)
    journal.write_bytes(head)
    for mode in ("new", "resume"):
        with pytest.raises(OutputError, match=r"journal of the unfinished run cannot be read.*--overwrite"):
            CheckpointWriter(tmp_path, LAYOUT, PLAN, mode=mode)
    finish(tmp_path, mode="overwrite")
    assert files_in(tmp_path) == COMPLETE


def test_resume_in_an_empty_folder_begins(tmp_path) -> None:
    assert finish(tmp_path / "new") == sum(len(data) for _, _, data in ALL)
    assert files_in(tmp_path / "new") == COMPLETE
    with pytest.raises(OutputError, match="it may be complete already"):
        CheckpointWriter(tmp_path / "new", LAYOUT, PLAN, mode="resume")


def test_the_journal_is_lines_of_json(tmp_path) -> None:
    head, *lines = unfinished(tmp_path, 3).read_text().splitlines()
    assert json.loads(head)["plan"] == PLAN
    assert [tuple(json.loads(line)[:2]) for line in lines] == [(name, start) for name, start, _ in ALL[:3]]
