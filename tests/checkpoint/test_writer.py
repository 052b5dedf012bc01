"""Planned writing: any order, any threads, both ways of writing; nothing looks finished before it is."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from output_sample import PLAN, SIDE_FILES, content, expected_files, files_in, pieces, sample_layout
from safetensors import safe_open

from mergekit_px.checkpoint import background, file_pool
from mergekit_px.checkpoint.destination import output_state
from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.layout import OutputTensor, plan_layout
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import InputError, OutputError, OutputLockedError, RunError, UsageError

BOTH_WAYS = pytest.mark.parametrize("portable", [False, True], ids=["pwrite", "portable"])


def write_all(writer, layout, **how) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda each: writer.write(each[0], each[1], memoryview(each[2])), pieces(layout, **how)))


@BOTH_WAYS
@pytest.mark.parametrize("shard_size", [10**9, 40_000, 600], ids=["one", "few", "many"])
def test_random_order_by_several_threads_gives_the_reference_bytes(tmp_path, monkeypatch, portable, shard_size) -> None:
    monkeypatch.setattr(file_pool, "_OPEN_FILES", 3)
    monkeypatch.setattr(background, "_PIECE", 512)
    monkeypatch.setattr(background, "_FLUSH_EVERY", 4096)
    layout = sample_layout(shard_size)
    writer = CheckpointWriter(tmp_path / "out", layout, PLAN, mode="new", portable=portable)
    assert writer.finished_bytes == 0
    write_all(writer, layout)
    assert writer.remaining_bytes == 0 and writer.finished_bytes == sum(size for _, _, size in layout.location.values())
    published = writer.publish(SIDE_FILES)
    writer.close()
    expected = expected_files(layout) | SIDE_FILES
    assert files_in(tmp_path / "out") == expected
    assert set(published.files) == {*expected, "pxmerge.lock.json"} and published.directory == tmp_path / "out"
    for name, data in expected.items():
        assert published.files[name].sha256 == hashlib.sha256(data).hexdigest()
        assert published.files[name].size == len(data)
    assert not (tmp_path / "out" / ".pxmerge").exists()


def test_output_is_read_by_the_reference_reader_and_by_ours(tmp_path) -> None:
    layout = sample_layout()
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        write_all(writer, layout)
        writer.publish({})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(layout.location)
    for shard in layout.shards:
        with safe_open(tmp_path / shard.file, framework="pt") as file:
            assert sorted(file.keys()) == sorted(shard.header.entries)
            for name in set(file.keys()) - {"packed"}:
                loaded = file.get_tensor(name).reshape(-1).contiguous()
                raw = loaded.view(__import__("torch").uint8).numpy().tobytes()
                assert raw == content(name, len(raw)), name


def test_the_environment_forces_the_portable_way(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PXMERGE_PORTABLE_IO", "1")
    monkeypatch.setattr(os, "pwrite", None)
    monkeypatch.setattr(os, "preadv", None)
    layout = sample_layout()
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        write_all(writer, layout)
        writer.publish({})
    assert files_in(tmp_path) == expected_files(layout)


def test_side_files_come_from_bytes_paths_and_functions(tmp_path) -> None:
    source = tmp_path / "tokenizer.model"
    source.write_bytes(b"\0\1\2" * 999_999)
    source.chmod(0o600)
    layout = sample_layout()
    seen = []

    def lock_file(published) -> bytes:
        seen.extend(published)
        return published["config.json"].sha256.encode()

    with CheckpointWriter(tmp_path / "out", layout, PLAN, mode="new") as writer:
        write_all(writer, layout)
        writer.publish(
            {
                "pxmerge.lock.json": lock_file,
                "config.json": b"{}",
                "tokenizer.model": source,
                "additional_chat_templates/tool.jinja": b"x",
            }
        )
    shards = [shard.file for shard in layout.shards]
    assert seen == [
        *shards,
        "tokenizer.model",
        "additional_chat_templates/tool.jinja",
        "model.safetensors.index.json",
        "config.json",
    ]
    out = tmp_path / "out"
    assert (out / "tokenizer.model").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((out / "tokenizer.model").stat().st_mode) != 0o600
    assert (out / "additional_chat_templates" / "tool.jinja").read_bytes() == b"x"
    assert (out / "pxmerge.lock.json").read_text() == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".pxmerge/x", "a\\b", "model-00001-of-00003.safetensors", ""])
def test_side_files_stay_in_the_folder(tmp_path, name) -> None:
    layout = sample_layout()
    assert layout.shards[0].file == "model-00001-of-00003.safetensors"
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        write_all(writer, layout)
        with pytest.raises(UsageError, match="not a name for a file beside the weights"):
            writer.publish({name: b""})
    assert output_state(tmp_path).unfinished is not None


def test_a_side_file_that_cannot_be_read_is_an_input_error(tmp_path) -> None:
    layout = sample_layout()
    with CheckpointWriter(tmp_path / "out", layout, PLAN, mode="new") as writer:
        write_all(writer, layout)
        with pytest.raises(InputError, match=r"vocab\.txt: cannot be copied: No such file"):
            writer.publish({"vocab.txt": tmp_path / "vocab.txt", "config.json": b"{}"})
    assert not (tmp_path / "out" / "config.json").exists()


@BOTH_WAYS
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask, portable) -> None:
    layout = sample_layout()
    before = os.umask(umask)
    try:
        with CheckpointWriter(tmp_path / "out", layout, PLAN, mode="new", portable=portable) as writer:
            write_all(writer, layout)
            writer.publish(SIDE_FILES)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_nothing_looks_finished_before_it_is(tmp_path) -> None:
    layout = sample_layout()
    writer = CheckpointWriter(tmp_path, layout, PLAN, mode="new")
    for name, start, data in pieces(layout)[:-1]:
        writer.write(name, start, memoryview(data))
    with pytest.raises(RunError, match=r"bytes of the output were not written, the first of them in \w.*--resume"):
        writer.publish(SIDE_FILES)
    writer.close()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [".pxmerge"]
    with pytest.raises(RunError, match="the run has ended"):
        writer.write("big", 0, memoryview(b"1"))


def test_bytes_outside_the_plan_are_refused(tmp_path) -> None:
    layout = sample_layout()
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        for name, start, size in [("nobody", 0, 1), ("big", -1, 1), ("big", 47_999, 2), ("empty", 0, 1)]:
            with pytest.raises(RunError, match="not planned"):
                writer.write(name, start, memoryview(bytes(size)))
        writer.write("empty", 0, memoryview(b""))
        assert writer.done("empty", 0, 0) and not writer.done("big", 0, 1)
        writer.write("big", 4, memoryview(bytes(8)).cast("f"))
        assert writer.done("big", 4, 12) and not writer.done("big", 3, 12) and writer.finished_bytes == 8


def test_an_output_without_tensors_is_a_file_without_tensors(tmp_path) -> None:
    layout = plan_layout([], metadata={"format": "pt"})
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        writer.publish({})
    assert open_checkpoint(tmp_path).tensors == {}


def test_places_that_cannot_be_used(tmp_path) -> None:
    layout = sample_layout()
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            CheckpointWriter(place, layout, PLAN, mode="new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for mode, message in [("new", "not empty.*--overwrite"), ("resume", "no unfinished run to resume.*--overwrite")]:
        with pytest.raises(OutputError, match=message):
            CheckpointWriter(tmp_path / "full", layout, PLAN, mode=mode)
    assert files_in(tmp_path / "full") == {"notes.txt": b"mine"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_run_without_a_finished_byte_leaves_nothing(tmp_path) -> None:
    CheckpointWriter(tmp_path / "out", sample_layout(), PLAN, mode="new").close()
    assert not (tmp_path / "out").exists()


def test_a_mount_point_counts_as_empty(tmp_path) -> None:
    (tmp_path / "lost+found").mkdir()
    CheckpointWriter(tmp_path, sample_layout(), PLAN, mode="new").close()


def test_two_writers_at_once(tmp_path) -> None:
    layout = sample_layout()
    first = CheckpointWriter(tmp_path, layout, PLAN, mode="new")
    for mode in ("new", "resume", "overwrite"):
        with pytest.raises(OutputLockedError, match=f"another run is writing there .process {os.getpid()}."):
            CheckpointWriter(tmp_path, layout, PLAN, mode=mode)
    write_all(first, layout)
    first.publish(SIDE_FILES)
    with pytest.raises(OutputError, match="not empty"):
        CheckpointWriter(tmp_path, layout, PLAN, mode="new")


def test_a_writer_in_another_process_is_seen(tmp_path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from output_sample import *;"
        "w = CheckpointWriter(Path(sys.argv[1]), sample_layout(), PLAN, mode='new'); print('ready', flush=True);"
        "time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with pytest.raises(OutputLockedError, match=f"process {child.pid}"):
            CheckpointWriter(tmp_path, sample_layout(), PLAN, mode="resume")
        child.kill()
    CheckpointWriter(tmp_path, sample_layout(), PLAN, mode="resume").close()


@pytest.mark.parametrize("attempt", range(5))
def test_a_crowd_at_one_folder(tmp_path, attempt) -> None:
    layout = sample_layout()
    crowd = 6
    start_line = threading.Barrier(crowd)

    def run(_: int) -> str:
        start_line.wait()
        try:
            with CheckpointWriter(tmp_path / "out", layout, PLAN, mode="new") as writer:
                write_all(writer, layout)
                writer.publish(SIDE_FILES)
        except (OutputLockedError, OutputError) as error:
            return type(error).__name__
        return "published"

    with ThreadPoolExecutor(crowd) as threads:
        ends = list(threads.map(run, range(crowd)))
    assert ends.count("published") == 1
    assert files_in(tmp_path / "out") == expected_files(layout) | SIDE_FILES
    assert not (tmp_path / "out" / ".pxmerge").exists()


def test_many_small_tensors(tmp_path) -> None:
    tensors = [OutputTensor(f"t{number}", DTYPES["BF16"], (4,)) for number in range(5000)]
    layout = plan_layout(tensors, metadata={})
    with CheckpointWriter(tmp_path, layout, PLAN, mode="new") as writer:
        for name in layout.location:
            writer.write(name, 0, memoryview(content(name, 8)))
        writer.publish({})
    assert files_in(tmp_path) == expected_files(layout)
