"""``pxmerge search``: several objectives, trials side by side, warm starts, limits of time, where trials are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_px.cli import main
from mergekit_px.errors import RunError, UsageError
from mergekit_px.learn.search import scratch
from mergekit_px.learn.search.objectives import (
    Objective,
    most_balanced,
    non_dominated,
    parse_objectives,
    require_objectives,
)
from mergekit_px.learn.search.score import CommandScore, printed_numbers, stop_programs
from mergekit_px.learn.search.settings import parse_time
from mergekit_px.testing import write_checkpoint

SCORE = """
import json, pathlib, struct, sys, time
calls, folder = map(pathlib.Path, sys.argv[1:])
with calls.open("a") as file:
    file.write(f"{folder}\\n")
first, second = struct.unpack("<2f", (folder / "model.safetensors").read_bytes()[-8:])
time.sleep(0.2 * (second < 0.1))  # the first of a grid ends last
print(json.dumps({"near": -abs(second - 0.3), "size": second, "note": "a"}))
"""

Found = dict[str, Any]
ONE = "merge.sources.one"


@pytest.fixture
def search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Found]:
    """Searches mixtures of two models whose last number is 0 and 1; returns the report, with what was said."""
    for name, value in (("zero", 0.0), ("one", 1.0)):
        write_checkpoint(tmp_path / name, {"w": torch.tensor([5.0, value])})
    recipe = f"models: {{zero: {tmp_path / 'zero'}, one: {tmp_path / 'one'}}}\n"
    recipe += "merge: {method: linear, sources: {zero: 0.5, one: 0.6}, params: {normalize: false}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "score.py").write_text(SCORE)

    def searched(*words: object, code: int = 0, over: str = f"{ONE}=0,0.2,0.4,0.8") -> Found:
        score = f"{sys.executable} -S {tmp_path / 'score.py'} {tmp_path / 'calls'} {{}}"
        given = ["search", tmp_path / "recipe.yaml", "--over", over, "--device", "cpu", "--json", *words]
        given += [] if "--score" in words else ["--score", score]
        assert main(list(map(str, given))) == code
        said = capsys.readouterr()
        return {"said": said.err, **(json.loads(said.out) if code == 0 else {})}

    return searched


def test_a_front_of_two_objectives_and_the_one_that_is_picked(search: Callable[..., Found], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = search("--objective", "near", "size:min", "-o", out)
    front = [(*one["values"].values(), pytest.approx(one["scores"]["near"], abs=1e-6)) for one in found["front"]]
    assert front == [(0.0, -0.3), (0.2, -0.1)]  # 0.4 is as near as 0.2 and larger; as written 0.6 is worse in both
    assert found["objectives"] == ["near:max", "size:min"] and found["pick"] == "near"
    assert found["best"]["values"] == {ONE: 0.2} and found["scores"]["best"].keys() == {"near", "size"}
    again = search("--objective", "near", "size:min", "-o", out, "--resume", "--pick", "size")
    assert again["best"]["values"] == {ONE: 0.0} and len((tmp_path / "calls").read_text().splitlines()) == 5
    assert json.loads((out / "report.json").read_text())["front"] == found["front"]


def test_trials_side_by_side_end_as_one_after_another(search: Callable[..., Found], tmp_path: Path) -> None:
    alone = search("--objective", "near", "-o", tmp_path / "alone")
    beside = search("--objective", "near", "-o", tmp_path / "beside", "--jobs", "4")
    assert {key: alone[key] for key in ("best", "scores", "front", "trials")} == {
        key: beside[key] for key in ("best", "scores", "front", "trials")
    }
    lines = [(tmp_path / name / "trials.jsonl").read_text().splitlines()[1:] for name in ("alone", "beside")]
    one, other = ([{**json.loads(line), "seconds": 0} for line in log] for log in lines)
    assert one == other
    assert len({Path(line).name for line in (tmp_path / "calls").read_text().splitlines()}) > 1


def test_a_warm_start_is_tried_first_and_leads_on(search: Callable[..., Found], tmp_path: Path) -> None:
    search("--objective", "near", "-o", tmp_path / "first")
    words = ("--objective", "near", "--start-from", tmp_path / "first" / "trials.jsonl", "--trials", "3")
    found = search(*words, "-o", tmp_path / "second", over=f"{ONE}=0.1:0.7")
    lines = [json.loads(line) for line in (tmp_path / "second" / "trials.jsonl").read_text().splitlines()[1:]]
    assert [line["values"] for line in lines] == [[], [0.2], [0.4], [0.1]]  # the best of before, then the grid
    assert "2 of 4 points" in found["said"] and found["stopped"] == "--trials 3"
    for point, said in (
        ({ONE: 0.25}, f"none of its points lies within the ranges of --over; the first has {ONE}=0.25"),
        ({"one": 0.5}, f"a point has no value for {ONE}, which --over searches; its names are one"),
        ({ONE: "x"}, f"a point has 'x', not a finite number, for {ONE}"),
    ):
        (tmp_path / "points.jsonl").write_text(json.dumps(point))
        words = ("--start-from", tmp_path / "points.jsonl", "-o", tmp_path / "no")
        assert said in search(*words, code=2, over=f"{ONE}=0.3:1")["said"]


def test_time_that_is_over_leaves_the_best_until_then(search: Callable[..., Found], tmp_path: Path) -> None:
    found = search("--objective", "near", "--time", "0.01s", "-o", tmp_path / "out")
    assert found["stopped"] == "--time 0.01s" and found["trials"] == 1 and found["best"]["set"] == []
    assert "--time 0.01s is over after 0 trials" in found["said"] and (tmp_path / "out" / "model").is_dir()
    found = search("--objective", "near", "-o", tmp_path / "out", "--resume")
    assert found["best"]["values"] == {ONE: 0.2} and len((tmp_path / "calls").read_text().splitlines()) == 5
    assert parse_time("1h30m") == 5400 and parse_time("0.5d") == 43200
    for text in ("30", "m", "1h 2m", "-1s"):
        with pytest.raises(UsageError):
            parse_time(text)


def test_trials_are_where_there_is_room(
    search: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    found = search("--objective", "near", "--scratch", tmp_path / "memory", "-o", tmp_path / "out", over=f"{ONE}=0,1")
    places = {Path(line).parent.parent for line in (tmp_path / "calls").read_text().splitlines()}
    assert places == {tmp_path / "memory"} and f"merged in {tmp_path / 'memory'}" in found["said"]
    assert not list((tmp_path / "memory").iterdir())
    abandoned = tmp_path / "memory" / "pxmerge-search-x"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    monkeypatch.setattr(scratch, "IN_MEMORY", tmp_path / "memory")
    for fits, expected in ((True, tmp_path / "memory"), (False, tmp_path / "beside")):
        (tmp_path / "beside").mkdir(exist_ok=True)
        monkeypatch.setattr(scratch, "_fits_in_memory", lambda nbytes, fits=fits: fits)
        with scratch.scratch_folder(None, tmp_path / "beside", 10, lambda line: None) as folder:
            assert folder.parent == expected
            (folder / "trial").mkdir()
            scratch.remove_folders()  # as a signal does
            assert not folder.exists()
    assert not abandoned.exists()
    assert "no such folder" in search("--scratch", tmp_path / "none", "-o", tmp_path / "no", code=4)["said"]


def test_what_dominates() -> None:
    gains = [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.4, 0.4], [0.0, 1.0], [float("-inf")] * 2]
    assert non_dominated(gains) == [0, 1, 4]
    assert most_balanced([[1.0, 0.0], [0.8, 0.8], [0.0, 1.0]]) == 1
    assert parse_objectives(["a", "b:min", "acc,none:max"], minimize=False) == (
        Objective("a"),
        Objective("b", True),
        Objective("acc,none", False),
    )


def test_bad_objectives(search: Callable[..., Found], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert "none is called score" in search(*out, code=5)["said"]
    assert "did you mean 'near'?" in search("--objective", "naer", *out, "--overwrite", code=5)["said"]
    for words, said in (
        (("--objective", "near", "--minimize"), "near:min"),
        (("--objective", "near", "near:min"), "given twice"),
        (("--objective", "near", "--pick", "size"), "no objective 'size'"),
        (("--time", "soon"), "no time"),
        (("--evaluate", "lm_eval:a"), "one score"),
        (("--start-from", tmp_path / "score.py"), "no point"),
    ):
        assert said in search(*words, *out, "--overwrite", code=3 if "--start-from" in words else 2)["said"]
    assert (
        "may have 10"
        in search("--points", 10**8, "--objective", "near", *out, "--overwrite", over=f"{ONE}=0:1", code=2)["said"]
    )
    assert printed_numbers('{"a": 2, "b": "x"}', "") == {"score": 2.0, "a": 2.0}
    with pytest.raises(RunError, match="no number called"):
        require_objectives({"a": 1.0}, [Objective("b")], "")


@pytest.mark.parametrize("at_once", [False, True])
def test_what_a_program_began_ends_with_it(tmp_path: Path, at_once: bool) -> None:
    """A shell's own programs hold its output open, which is read to its end."""
    score = CommandScore("sh -c 'sleep 60 & touch $0/begun; wait'")
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(score, tmp_path)
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        stop_programs() if at_once else score.stop()
        with pytest.raises(RunError, match="code -9"):
            scored.result(timeout=20)
        if not at_once:
            with pytest.raises(RunError, match="code -9"):  # one that begins late
                pool.submit(score, tmp_path).result(timeout=20)
