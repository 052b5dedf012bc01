from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_px.checkpoint.training_run import check_spacing, is_pattern, training_run
from mergekit_px.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, *, recorded: object = None, weights: bool = True) -> None:
    folder = Path(name)
    folder.mkdir(parents=True)
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    if recorded is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": recorded}))


def found(*references: str) -> list[tuple[str, int | None]]:
    return [(each.reference, each.step) for each in training_run(references).checkpoints]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step1000-unsharded", 1000),
        ("global_step0020", 20),
        ("iter_0000500", 500),
        ("epoch=3-step=40", 40),
        ("step-7.ckpt", 7),
        ("700", 700),
    ],
)
def test_the_step_is_in_the_name(name: str, step: int) -> None:
    make(f"run/{name}")
    assert found("run") == [(f"run/{name}", step)]


def test_order_is_that_of_numbers_and_the_trainer_knows_better_than_the_name() -> None:
    make("run/checkpoint-1000")
    make("run/checkpoint-200")
    make("run/checkpoint-best", recorded=900)
    make("run/checkpoint-1", recorded=100)
    order = [("run/checkpoint-1", 100), ("run/checkpoint-200", 200), ("run/checkpoint-best", 900)]
    assert found("run") == [*order, ("run/checkpoint-1000", 1000)]
    assert found("run/checkpoint-*") == found("run")
    assert found("run/checkpoint-1000", "run/checkpoint-200")[0][1] == 200


@pytest.mark.parametrize("name", ["tmp-checkpoint-3", "checkpoint-3.tmp", "checkpoint-3-incomplete", "step-3_tmp"])
def test_what_is_still_being_written_is_skipped_by_name(name: str) -> None:
    make("run/checkpoint-1")
    make(f"run/{name}")
    make("run/checkpoint-2", weights=False)
    make("run/logs")
    run = training_run(["run"])
    assert [each.step for each in run.checkpoints] == [1]
    assert any(name in note for note in run.notes) and any("checkpoint-2 " in note for note in run.notes)
    assert not any("logs" in note for note in run.notes)
    assert found("run/checkpoint-1", f"run/{name}") == [("run/checkpoint-1", 1)]


@pytest.mark.parametrize(
    ("names", "references", "message"),
    [
        (["run/checkpoint-5", "run/step-5"], ["run"], "two checkpoints are of step 5"),
        (["run/final"], ["run"], "no checkpoints of a training run"),
        (["run/final"], ["run/nothing-*"], "no checkpoints of a training run"),
        (["run/checkpoint-1"], ["run/checkpoint-1", "run/checkpoint-2"], "no such file or folder"),
        (["run/checkpoint-1"], ["run/checkpoint-1", "run/checkpoint-1"], "two checkpoints are of step 1"),
        (["run/checkpoint-1", "run/final"], ["run/*"], "run/final: its step cannot be told"),
    ],
)
def test_what_is_no_run_is_refused(names: list[str], references: list[str], message: str) -> None:
    for name in names:
        make(name)
    with pytest.raises(InputError, match=message):
        training_run(references)


def test_a_list_without_steps_keeps_its_order() -> None:
    make("second")
    make("first")
    assert found("second", "first") == [("second", None), ("first", None)]


@pytest.mark.parametrize("steps", [[100, 200, 300], [100, 200, 237], [1, 2, 4, 8, 16], [5], [100, 350, 900]])
def test_even_or_free_steps_are_no_hole(steps: list[int]) -> None:
    check_spacing(steps, "run")


@pytest.mark.parametrize(
    ("steps", "missing"), [([100, 200, 400], "step 300 is"), ([0, 10, 20, 50, 60, 70], "steps 30, 40 are")]
)
def test_a_hole_is_named(steps: list[int], missing: str) -> None:
    with pytest.raises(InputError, match=missing):
        check_spacing(steps, "run")


def test_a_name_that_is_there_is_no_pattern() -> None:
    make("run[1]")
    assert is_pattern("run/*") and is_pattern("run[12]") and not is_pattern("run[1]")
    assert not is_pattern("https://host/a?b") and not is_pattern("org/name")
