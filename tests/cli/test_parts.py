"""A merge in parts, as the jobs of an array do it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from folders import contents

RECIPE = """
models: {base: base, math: math, code: code}
merge: {method: ties, base: base, sources: [math, code], params: {density: 0.5}}
output: {shard_size: 700}
"""


@pytest.fixture(autouse=True)
def recipe(models) -> None:
    Path("recipe.yaml").write_text(RECIPE)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_parts_put_together_are_the_bytes_of_a_run_in_one_piece(run, count: int) -> None:
    assert run("run", "recipe.yaml", "-o", "merged").code == 0
    Path("merged").rename("whole")
    for number in reversed(range(1, count + 1)):
        outcome = run("run", "recipe.yaml", "-o", "merged", "--part", f"{number}/{count}")
        assert outcome.code == 0, outcome.stderr
    assert not list(Path("merged").glob("*")) or set(Path("merged").iterdir()) == {Path("merged/.pxmerge")}
    outcome = run("publish", "merged")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == "merged\n"
    assert contents("merged") == contents("whole")
    assert run("verify", "merged").code == 0


def test_publishing_names_the_parts_that_are_missing(run) -> None:
    assert run("run", "recipe.yaml", "-o", "out", "--part", "2/4").code == 0
    outcome = run("publish", "out")
    assert outcome.code == 4 and "parts 1, 3, 4 of 4 are not finished" in outcome.stderr
    assert not Path("out/pxmerge.lock.json").exists()
    for number in (1, 3):
        assert run("run", "recipe.yaml", "-o", "out", "--part", f"{number}/4").code == 0
    outcome = run("publish", "out")
    assert outcome.code == 4 and "part 4 of 4 is not finished" in outcome.stderr


def test_a_part_that_was_interrupted_goes_on(run, monkeypatch) -> None:
    from mergekit_px.checkpoint.writer import CheckpointWriter
    from mergekit_px.errors import WriteError

    write, calls = CheckpointWriter.write, []

    def failing(self, name, start, buffer):
        calls.append(name)
        if len(calls) > 2:
            raise WriteError("the disk refused")
        write(self, name, start, buffer)

    words = ("run", "recipe.yaml", "-o", "out", "--threads", 1)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", failing)
        assert run(*words, "--part", "1/2").code == 5
    assert run("publish", "out").code == 4
    written: list[str] = []

    def counted(self, name, start, buffer):
        written.append(name)
        write(self, name, start, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", counted)
        assert run(*words, "--part", "1/2").code == 0
    assert not set(written) & set(calls[:2])
    assert "is there already" in run(*words, "--part", "1/2").stderr
    assert run(*words, "--part", "2/2").code == 0
    assert run("publish", "out").code == 0 and run("verify", "out").code == 0


def test_parts_of_another_plan_are_refused(run) -> None:
    assert run("run", "recipe.yaml", "-o", "out", "--part", "1/2").code == 0
    changed = ("run", "recipe.yaml", "-o", "out", "--set", "merge.params.density=0.9")
    outcome = run(*changed, "--part", "1/2")
    assert outcome.code == 4 and "is of another plan" in outcome.stderr
    assert run(*changed, "--part", "2/2").code == 0
    outcome = run("publish", "out")
    assert outcome.code == 4 and "part 2 was made with another plan than part 1" in outcome.stderr
    assert run("run", "recipe.yaml", "-o", "out", "--part", "2/2", "--overwrite").code == 0
    assert run("publish", "out").code == 0


def test_each_input_file_is_hashed_by_one_part(run) -> None:
    for number in (1, 2, 3):
        assert run("run", "recipe.yaml", "-o", "out", "--part", f"{number}/3").code == 0
    counts = []
    for path in sorted(Path("out/.pxmerge/array").iterdir()):
        inputs = json.loads((path / "pxmerge.lock.json").read_text())["inputs"]
        counts.append([file["sha256"] is not None for each in inputs.values() for file in each["files"].values()])
    assert [sum(column) for column in zip(*counts, strict=True)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("run recipe.yaml -o out --part 0/3", 2, "is no part"),
        ("run recipe.yaml -o out --part 4/3", 2, "is no part"),
        ("run recipe.yaml -o out --part three", 2, "write 3/8"),
        ("run recipe.yaml -o out.safetensors --part 1/2", 4, "name of a file"),
        ("run recipe.yaml -o math --part 1/2", 4, "math"),
        ("publish nowhere", 3, "no parts of a merge"),
        ("publish base", 3, "no parts of a merge"),
    ],
)
def test_mistakes(run, words: str, code: int, message: str) -> None:
    outcome = run(*words.split())
    assert outcome.code == code and message in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error")


def test_parts_of_different_counts_are_refused(run) -> None:
    assert run("run", "recipe.yaml", "-o", "out", "--part", "1/2").code == 0
    assert run("run", "recipe.yaml", "-o", "out", "--part", "1/3").code == 0
    outcome = run("publish", "out")
    assert outcome.code == 4 and "parts of 2 and of 3 are there" in outcome.stderr


def test_the_commands_of_the_guide_run(run) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "parts.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    lines = [line for line in lines if "--cluster" not in line]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "pxmerge"
        assert run(*words[1:]).code == 0, line
    assert run("verify", "merged").code == 0


def test_room_is_wanted_for_the_part_alone(run, monkeypatch) -> None:
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    refused = run("run", "recipe.yaml", "-o", "whole")
    assert refused.code == 4 and "2,000 are free" in refused.stderr
    assert run("run", "recipe.yaml", "-o", "out", "--part", "2/4").code == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused = run("run", "recipe.yaml", "-o", "out", "--part", "3/4")
    assert refused.code == 4 and "more bytes of disk" in refused.stderr


def test_the_plan_tells_the_work_of_several_workers(run) -> None:
    document = run("plan", "recipe.yaml", "--workers", "1,2,50", "--json").document()
    one, two, many = document["schedules"]
    files = [file["bytes"] for file in document["output"]["shards"]]
    # Statistics over the model are a pass of their own over what is merged, which here is all.
    assert one["bytes_read"] == 2 * document["bytes_read"] and one["bytes_written"] == document["bytes_written"]
    assert one["seconds"] > document["seconds_bound"] and one["balance"] == pytest.approx(1)
    assert two["busy"] == 2 and one["bytes_read"] / 2 <= two["bytes_read"] < one["bytes_read"]
    assert one["seconds"] / 2 <= two["seconds"] < one["seconds"]
    assert many["busy"] == 7 and many["bytes_written"] in files and many["balance"] < 0.2
    assert many["seconds"] <= two["seconds"]
    table = run("plan", "recipe.yaml", "--workers", "1,2,50").stdout
    assert re.search(r"^ +2 +2 .* under 1 ms +\d+%$", table, re.MULTILINE)
    assert run("plan", "recipe.yaml", "--json").document()["schedules"] == []
    for words in ("0", "1,", "two"):
        outcome = run("plan", "recipe.yaml", "--workers", words)
        assert outcome.code == 2 and "write it as 1,8,64" in outcome.stderr
