"""``pxmerge search``: strategies on known functions, the log, scores by command and by data, bad input."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.cli import main
from mergekit_px.errors import InputError, OutputError, UsageError
from mergekit_px.learn.search import merges
from mergekit_px.learn.search.objectives import Objective
from mergekit_px.learn.search.space import Variable, overrides, parse_variable
from mergekit_px.learn.search.strategies import Strategy, StrategyOptions, begin_search
from mergekit_px.learn.search.trials import Trial, TrialLog, trial_head
from mergekit_px.testing import write_checkpoint

X, Y = Variable(("x",), 0.0, 2.0), Variable(("y",), -1.0, 1.0)


def walked(
    strategy: Strategy,
    variables: Sequence[Variable],
    score: Callable[..., float],
    most: int = 500,
    **options: float,
) -> list[tuple[float, list[float]]]:
    """All (score, values) of a strategy."""
    search = begin_search(strategy, variables, StrategyOptions(**options))
    found: list[tuple[float, list[float]]] = []
    batch = next(search)
    while len(found) < most:
        gains = [score(*values) for values in batch]
        found += zip(gains, batch, strict=True)
        try:
            batch = search.send([[gain] for gain in gains])
        except StopIteration:
            break
    return found[:most]


def test_forms_of_a_variable() -> None:
    assert parse_variable("merge.params.t=0:1") == Variable(("merge.params.t",), 0.0, 1.0)
    assert parse_variable("a,b=-1:1:0.5").grid(9) == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert parse_variable("a=0:0.3:0.1").values == (0.0, 0.1, 0.2, 0.3)
    assert parse_variable("a=0.3,0.1") == Variable(("a",), 0.1, 0.3, (0.3, 0.1))
    assert Variable(("a",), 0.0, 1.0).grid(5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert overrides([parse_variable("a,b=0:1"), Y], [0.1, 1 / 3]) == ["a=0.1", "b=0.1", "y=0.3333333333"]


@pytest.mark.parametrize("text", ["a", "=0:1", "a=1:0", "a=0:1:2:3", "a=x:y", "a=0:inf", "a=0:1:0", "a=1,1", "a,=0:1"])
def test_what_is_no_variable(text: str) -> None:
    with pytest.raises(UsageError):
        parse_variable(text)


def test_a_grid_tries_every_combination_once() -> None:
    found = [values for _, values in walked("grid", [X, parse_variable("y=5,6")], lambda x, y: 0.0, points=3)]
    assert found == [[0.0, 5.0], [0.0, 6.0], [1.0, 5.0], [1.0, 6.0], [2.0, 5.0], [2.0, 6.0]]


@pytest.mark.parametrize("peak", [0.0, 0.31, 1.234, 2.0])
def test_golden_section_finds_a_peak_in_the_steps_that_theory_says(peak: float) -> None:
    found = walked("golden", [X], lambda x: -abs(x - peak), tolerance=0.01)
    assert abs(max(found)[1][0] - peak) <= 2 * 0.01
    assert len(found) == 2 + math.ceil(math.log(0.01) / math.log((math.sqrt(5) - 1) / 2))


def test_coordinates_find_a_peak_and_stop_when_nothing_moves() -> None:
    found = walked("coordinate", [X, Y], lambda x, y: -((x - 0.4) ** 2) - (y - 0.7) ** 2, tolerance=0.01, rounds=9)
    best = max(found)[1]
    assert abs(best[0] - 0.4) < 0.03 and abs(best[1] - 0.7) < 0.03
    assert len(found) < 2 * 3 * 13


def test_cma_finds_a_tilted_peak_again_and_again_and_stays_in_bounds() -> None:
    pytest.importorskip("cma")

    def score(x: float, y: float) -> float:
        return -((x - 0.4 + y - 0.7) ** 2) - 50 * (x - 0.4 - y + 0.7) ** 2

    found = walked("cma", [X, Y], score, most=240)
    best = max(found)[1]
    assert abs(best[0] - 0.4) < 0.02 and abs(best[1] - 0.7) < 0.02
    assert all(0 <= x <= 2 and -1 <= y <= 1 for _, (x, y) in found)
    assert found == walked("cma", [X, Y], score, most=240)
    assert found[0] != walked("cma", [X, Y], score, most=1, seed=1)[0]


def test_cma_survives_scores_that_are_not_finite() -> None:
    pytest.importorskip("cma")
    found = walked("cma", [X, Y], lambda x, y: -math.inf if x > 1 else -((x - 0.4) ** 2) - y * y, most=120)
    assert abs(max(found)[1][0] - 0.4) < 0.1


def test_strategies_that_do_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    options = StrategyOptions()
    for strategy, variables in {"golden": [X, Y], "coordinate": [parse_variable("a=1,2")], "cma": [X]}.items():
        with pytest.raises(UsageError, match="--how"):
            begin_search(strategy, variables, options)
    with pytest.raises(UsageError, match="x is searched twice"):
        begin_search("grid", [X, X], options)
    with pytest.raises(UsageError, match="nothing is to be searched"):
        begin_search("grid", [], options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pxmerge\[search\]"):
        begin_search("cma", [X, Y], options)
    with pytest.raises(UsageError, match="NSGA-II needs the library optuna"):
        begin_search("nsga2", [X, Y], options)


def test_nsga2_finds_a_front_again_and_again_and_takes_listed_values() -> None:
    pytest.importorskip("optuna")
    listed = parse_variable("y=0,1,2")

    def searched(**options: Any) -> list[tuple[float, float]]:
        """The front of x^2 and (x - 1)^2, both worse by y, is x from 0 to 1 and y = 0."""
        search = begin_search("nsga2", [X, listed], StrategyOptions(objectives=2, **options))
        batch, found = next(search), []
        for _ in range(8):
            found += map(tuple, batch)
            batch = search.send([[-math.inf if x > 1.9 else -(x**2) - y, -((x - 1) ** 2) - y] for x, y in batch])
        return found

    found = searched()
    assert found == searched() and found[:12] != searched(seed=1)[:12]
    assert {y for _, y in found} <= {0.0, 1.0, 2.0}
    last = found[-24:]  # of points drawn at random 4 would lie there
    assert sum(y == 0 and x <= 1.05 for x, y in last) >= 12 and len({round(x, 1) for x, y in last if y == 0}) > 4
    assert searched(start=[(0.5, 0.0), (0.75, 0.0)])[:2] == [(0.5, 0.0), (0.75, 0.0)]


def test_the_log_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    head = {name: trial_head(name, ["x"], [Objective("score")]) for name in "abc"}
    log = TrialLog(path, head["a"])
    log.add(Trial(1, (0.1, 1 / 3), None, 2.0))
    log.add(Trial(0, (), {"score": 0.5}, 1.0))
    with path.open("a") as file:
        file.write('{"number": 2, "val')
    again = TrialLog(path, head["a"])
    assert again.trials == log.trials and [trial.number for trial in again.trials] == [0, 1]
    assert again.find([0.1, 1 / 3]).scores is None and again.find([0.1]) is None
    again.add(Trial(2, (7.0,), {"score": 1.0}, 0.0))
    assert len(TrialLog(path, head["a"]).trials) == 3
    with pytest.raises(OutputError, match="another"):
        TrialLog(path, head["b"])
    path.write_text('{"sear')  # killed before the first line was whole
    assert TrialLog(path, head["c"]).trials == [] and TrialLog(path, head["c"]).trials == []
    path.write_text("something\n")
    with pytest.raises(InputError, match="not the log"):
        TrialLog(path, head["a"])


SCORE = """
import json, pathlib, struct, sys
calls, target, folder = pathlib.Path(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])
with calls.open("a") as file:
    file.write("called\\n")
raw = (folder / "model.safetensors").read_bytes()
value = struct.unpack("<f", raw[-4:])[0]
print("the score of", folder.name, "is", -abs(value - target))
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two models whose last number is 0 and 1, a recipe that mixes them, and a program that scores the mixture."""
    for name, value in (("zero", 0.0), ("one", 1.0)):
        write_checkpoint(tmp_path / name, {"w": torch.tensor([5.0, value])})
    recipe = f"models: {{zero: {tmp_path / 'zero'}, one: {tmp_path / 'one'}}}\n"
    recipe += "merge: {method: linear, sources: {zero: 0.5, one: 0.5}, params: {normalize: false}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


ONE = "merge.sources.one"


def command(made: Path, out: Path, *words: object, over: Sequence[str] = (f"{ONE}=0:1",), target: float = 0.3) -> int:
    score = f"{sys.executable} {made / 'score.py'} {made / 'calls'} {target} {{}}"
    given = ["search", made / "recipe.yaml", "--over", *over, "--score", score, "-o", out, "--device", "cpu"]
    return main([str(word) for word in (*given, *words)])


def calls(made: Path, name: str = "calls") -> int:
    return (made / name).read_text().count("called")


def test_golden_section_by_a_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made / "out"
    assert command(made, out, "--how", "golden", "--tolerance", "0.05", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    best = report["best"]["values"][ONE]
    assert abs(best - 0.3) <= 0.05 and report["best"]["set"] == [f"{ONE}={best:.10g}"]
    assert report["scores"]["as written"] == {"validation": pytest.approx(-0.2)}
    assert load_file(out / "model" / "model.safetensors")["w"][1] == pytest.approx(best)
    assert str(best) in (out / "model" / "pxmerge.yaml").read_text()
    assert calls(made) == report["trials"] == len((out / "trials.jsonl").read_text().splitlines()) - 1
    assert sorted(one.name for one in out.iterdir()) == ["model", "pxmerge.lock.json", "report.json", "trials.jsonl"]


def test_a_resumed_search_tries_nothing_twice_and_ends_the_same(made: Path, capsys) -> None:
    whole, stopped = made / "whole", made / "stopped"
    words = ("--how", "golden", "--tolerance", "0.1", "-q")
    assert command(made, whole, *words) == 0
    total = calls(made)
    (made / "calls").unlink()
    assert command(made, stopped, *words, "--trials", "3") == 0
    assert calls(made) == 4
    assert command(made, stopped, *words) == 4 and "--resume" in capsys.readouterr().err
    assert command(made, stopped, *words, "--resume", "--minimize") == 4
    assert command(made, stopped, *words, "--resume") == 0
    assert calls(made) == total

    def tried(out: Path) -> list[list[object]]:
        lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[1:]]
        return [[line["values"], line["scores"]] for line in lines]

    assert tried(whole) == tried(stopped)
    files = [out / "model" / "model.safetensors" for out in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (made / "mine").mkdir()
    (made / "mine" / "notes.txt").touch()
    assert command(made, made / "mine", *words, "--resume") == 4
    capsys.readouterr()
    assert command(made, made / "begun", *words[:-1], "--resume") == 0  # stopped before its first trial
    assert "so --resume begins a new one" in capsys.readouterr().err


def test_the_test_takes_no_part_in_the_choice(made: Path) -> None:
    other = f"{sys.executable} {made / 'score.py'} {made / 'test-calls'} 0.9"
    assert command(made, made / "out", "--test-score", other, "-q", over=[f"{ONE}=0.3,0.9"]) == 0
    report = json.loads((made / "out" / "report.json").read_text())
    assert report["best"]["values"] == {ONE: 0.3}
    assert report["scores"]["best"] == {"validation": pytest.approx(0, abs=1e-6), "test": pytest.approx(-0.6)}
    assert report["scores"]["as written"]["test"] == pytest.approx(-0.4)
    assert calls(made, "test-calls") == 2 and calls(made) == 3


def test_less_may_be_better_and_the_recipe_as_written_may_be_best(made: Path) -> None:
    assert command(made, made / "far", "--minimize", "-q", over=[f"{ONE}=0.3,0.9"]) == 0
    assert json.loads((made / "far" / "report.json").read_text())["best"]["values"] == {ONE: 0.9}
    assert command(made, made / "same", "-q", over=[f"{ONE}=0.3,0.9"], target=0.5) == 0
    report = json.loads((made / "same" / "report.json").read_text())
    assert report["best"] == {"trial": 0, "set": [], "values": {}}
    assert load_file(made / "same" / "model" / "model.safetensors")["w"][1] == 0.5


def test_the_recipe_as_written_is_not_merged_again_where_a_search_comes_by_it(made: Path, capsys) -> None:
    assert command(made, made / "out", over=[f"{ONE}=0.3,0.5,0.7"]) == 0
    assert calls(made) == 3
    assert "as written: -0.2 (from the log)" in capsys.readouterr().err


def test_several_keys_move_as_one(made: Path) -> None:
    both = f"merge.sources.zero,{ONE}=0.3,0.7"
    assert command(made, made / "out", "-q", over=[both]) == 0
    torch.testing.assert_close(load_file(made / "out" / "model" / "model.safetensors")["w"], torch.tensor([3.0, 0.3]))


def test_a_merge_that_is_not_finite_is_a_failed_trial(made: Path) -> None:
    assert command(made, made / "out", "-q", over=[f"{ONE}=0.3,1e38"]) == 0
    report = json.loads((made / "out" / "report.json").read_text())
    assert report["failed"] == 1 and report["best"]["values"] == {ONE: 0.3}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_does_not_change_is_merged_once_and_the_trials_are_the_same(made: Path, monkeypatch, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in (("base", 0.0), ("zero", 0.0), ("one", 1.0)):
        tensors = {name: torch.randn(7, 5, generator=generator) for name in ("a", "b")}
        write_checkpoint(made / name, {**tensors, "w": torch.tensor([5.0, value])})
    text = "".join(f"  {name}: {made / name}\n" for name in ("base", "zero", "one"))
    rule = "{match: w, method: linear, params: {normalize: false}, weights: {one: 0.5}}"
    step = f"method: {method}, base: base, sources: {{zero: 1, one: 1}}, rules: [{rule}]"
    (made / "recipe.yaml").write_text(f"models:\n{text}merge: {{{step}}}\n")
    planned, merged = [], []

    def recorded(plan, **options):
        result = whole(plan, **options)
        planned.append({item.name: item.action for item in plan.items})
        merged.append(load_file(result.output / "model.safetensors"))
        return result

    whole = merges.run_plan
    monkeypatch.setattr(merges, "run_plan", recorded)
    key = "merge.rules.0.weights.one"
    assert command(made, made / "out", "-q", over=[f"{key}=0.25,0.75"]) == 0
    kept = {"linear": "copy", "ties": "merge"}[method]  # what ties needs to know spans the whole model
    if method == "linear":
        assert planned[0] == {"a": "merge", "b": "merge", "w": "merge"} and len(planned) == 5
    assert planned[-2] == {"a": kept, "b": kept, "w": "merge"}
    assert set(planned[-1].values()) == {"merge"}
    for value, found in zip((0.25, 0.75), merged[-3:-1], strict=True):
        assert (
            main(["run", str(made / "recipe.yaml"), "--set", f"{key}={value}", "-o", str(made / str(value)), "-q"]) == 0
        )
        expected = load_file(made / str(value) / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in ("a", "b", "w"))


CODE = """
import torch
from torch import nn

def linear():
    return Classifier()

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x - self.w[1]], 1)
"""


def data_command(made: Path, out: Path, *words: object) -> int:
    (made / "code.py").write_text(CODE)
    x = np.linspace(0, 1, 101).astype(np.float32)
    np.savez(made / "data.npz", x=x, labels=(x > 0.295).astype(np.int64))
    given = ["search", made / "recipe.yaml", "--over", f"{ONE}=0:1:0.1", "--data", made / "data.npz", "-o", out]
    given += ["--model", f"{made / 'code.py'}:linear", "--allow-code", "--device", "cpu", "-q"]
    return main([str(word) for word in (*given, *words)])


def test_accuracy_on_data_with_a_test_kept_apart(made: Path) -> None:
    assert data_command(made, made / "out") == 0
    report = json.loads((made / "out" / "report.json").read_text())
    assert report["best"]["values"] == {ONE: 0.3}
    scores = report["scores"]
    assert scores["best"]["validation"] > scores["as written"]["validation"]
    assert scores["best"]["test"] > scores["as written"]["test"] and scores["best"]["test"] > 95
    assert data_command(made, made / "none", "--test", "0") == 0
    assert "test" not in json.loads((made / "none" / "report.json").read_text())["scores"]["best"]


def test_a_test_file_is_only_for_the_result(made: Path) -> None:
    x = np.linspace(0, 1, 40).astype(np.float32)
    np.savez(made / "test.npz", x=x, labels=(x <= 0.295).astype(np.int64))  # all wrong
    assert data_command(made, made / "out", "--test", made / "test.npz") == 0
    report = json.loads((made / "out" / "report.json").read_text())
    assert report["best"]["values"] == {ONE: 0.3}
    assert report["scores"]["best"]["validation"] > 98 and report["scores"]["best"]["test"] < 5
    assert report["inputs"]["test"][0]["reference"] == str(made / "test.npz")


@pytest.mark.parametrize("how", ["coordinate", "cma"])
def test_two_values_by_a_command(made: Path, how: str) -> None:
    if how == "cma":
        pytest.importorskip("cma")
    over = ["merge.sources.zero=0.1:1", f"{ONE}=0:1"]
    words = ("--how", how, "--tolerance", "0.1", "--trials", "60", "--minimize", "-q")
    score = f"{sys.executable} {made / 'distance.py'}"
    (made / "distance.py").write_text(
        "import struct, sys\n"
        "first, second = struct.unpack('<2f', open(f'{sys.argv[1]}/model.safetensors', 'rb').read()[-8:])\n"
        "print((first / 5 - 0.6) ** 2 + (second - 0.3) ** 2)\n"
    )
    assert command(made, made / "out", *words, "--score", score, over=over) == 0
    report = json.loads((made / "out" / "report.json").read_text())
    best = report["best"]["values"]
    assert abs(best["merge.sources.zero"] + best[ONE] - 0.6) < 0.15 and abs(best[ONE] - 0.3) < 0.15
    assert report["settings"]["how"] == how and report["trials"] <= 61


def test_trials_keep_to_the_memory_of_a_streamed_merge(made: Path, monkeypatch, capsys) -> None:
    budgets = []

    def recorded(plan, **options):
        budgets.append((plan.options.memory, plan.budget.total))
        return whole(plan, **options)

    whole = merges.run_plan
    monkeypatch.setattr(merges, "run_plan", recorded)
    assert command(made, made / "out", "--memory", "2GB", "-q", over=[f"{ONE}=0.3,0.9"]) == 0
    assert len(budgets) == 4 and all(asked == 2_000_000_000 >= total for asked, total in budgets)
    assert command(made, made / "small", "--memory", "1MB", "-q") == 4
    assert "--memory" in capsys.readouterr().err and not (made / "small").exists()


def test_bad_input(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made / "out"

    def refused(code: int, *words: object, **options: object) -> str:
        assert command(made, out, *words, **options) == code and not (out / "model").exists()
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ")
        return error

    assert "one score" in refused(2, "--data", made / "data.npz")
    assert "has no 'two'" in refused(2, over=["merge.sources.two=0:1"])
    assert "densty" in refused(2, over=["merge.params.densty=0:1"])
    assert not out.exists()
    assert "not a number" in refused(5, "--score", f"{sys.executable} -c \"print('good')\"")
    assert "code 3: broken" in refused(
        5,
        "--overwrite",
        "--score",
        f"""{sys.executable} -c "import sys; print('broken', file=sys.stderr); sys.exit(3)" """,
    )
    for program, said in (("no-such-program-here", "no such program"), (str(made / "score.py"), "chmod +x")):
        error = refused(3, "--overwrite", "--score", program)
        assert said in error and "merged in" not in error  # before anything is merged
    assert "no trial has a score" in refused(5, "--overwrite", "--score", f"{sys.executable} -c \"print('nan')\"")
    assert "cannot be read" in refused(2, "--overwrite", "--score", "'open")
    assert "--test-score goes with --score" in (
        data_command(made, out, "--test-score", "x") and capsys.readouterr().err
    )
