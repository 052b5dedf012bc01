from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.task_vector import is_task_vector


def check(folder: str, models, *, is_delta: bool, **coefficients: float) -> None:
    """The folder holds the sum of models with these coefficients, taken densely in float64."""
    assert is_task_vector(open_checkpoint(folder)) is is_delta
    assert Path(folder, "config.json").exists() is not is_delta
    found = load_file(Path(folder) / "model.safetensors")
    for name, value in found.items():
        parts = [factor * models.weights[model][name].double() for model, factor in coefficients.items()]
        torch.testing.assert_close(value.double(), sum(parts), rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def taus(run, models) -> None:
    assert run("subtract", "math", "base", "-o", "tau-math").code == 0
    assert run("subtract", "code", "base", "-o", "tau-code").code == 0


def test_subtract_makes_a_task_vector(taus, models) -> None:
    check("tau-math", models, is_delta=True, math=1, base=-1)


def test_a_base_that_was_made_from_the_model_is_told(run, models) -> None:
    assert run("linear", "--sources", "base", "math", "-o", "mean").code == 0
    assert "given as the base, says that it was made from" in run("subtract", "base", "mean", "-o", "out").stderr
    assert "made from" not in run("subtract", "mean", "base", "-o", "other").stderr


def test_add_gives_the_fine_tune_back(run, taus, models) -> None:
    assert run("add", "base", "tau-math", "-o", "out").code == 0
    check("out", models, is_delta=False, math=1)


def test_add_several_with_weights(run, taus, models) -> None:
    assert run("add", "base", "tau-math", "tau-code", "--weights", 0.6, -0.4, "-o", "out").code == 0
    check("out", models, is_delta=False, base=0.8, math=0.6, code=-0.4)


def test_subtract_removes_a_task_vector(run, taus, models) -> None:
    refused = run("subtract", "code", "tau-math", "-o", "out")
    assert refused.code == 4
    assert "--allow-base-mismatch" in refused.stderr
    assert run("subtract", "code", "tau-math", "--allow-base-mismatch", "-o", "out").code == 0
    check("out", models, is_delta=False, code=1, math=-1, base=1)


def test_negate(run, taus, models) -> None:
    assert run("negate", "tau-math", "-o", "minus").code == 0
    check("minus", models, is_delta=True, math=-1, base=1)
    assert run("negate", "tau-math", "--base", "base", "-o", "from-tau").code == 0
    check("from-tau", models, is_delta=False, math=-1, base=2)
    assert run("negate", "math", "--base", "base", "-o", "from-model").code == 0
    check("from-model", models, is_delta=False, math=-1, base=2)


def test_scale(run, taus, models) -> None:
    assert run("scale", "tau-math", "--factor", 0.3, "-o", "less").code == 0
    check("less", models, is_delta=True, math=0.3, base=-0.3)
    assert run("scale", "tau-math", "--factor", -1.5, "--base", "base", "-o", "from-tau").code == 0
    check("from-tau", models, is_delta=False, math=-1.5, base=2.5)
    assert run("scale", "math", "--factor", -1.5, "--base", "base", "-o", "from-model").code == 0
    check("from-model", models, is_delta=False, math=-1.5, base=2.5)


def test_analogy(run, models) -> None:
    assert run("analogy", "base", "math", "code", "-o", "out").code == 0
    check("out", models, is_delta=False, code=1, math=1, base=-1)


def test_a_sum_of_task_vectors_is_one(run, taus, models) -> None:
    assert run("add", "tau-math", "tau-code", "-o", "out").code == 0
    check("out", models, is_delta=True, math=1, code=1, base=-2)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("negate math", 2, "give its --base"),
        ("scale math --factor 2", 2, "give its --base"),
        ("scale math", 2, "--factor"),
        ("scale math --factor much", 2, "--factor"),
        ("add base tau-math --weights 1 2", 2, "--weights has 2 values for 1 task vectors"),
        ("add base", 2, "TAU"),
        ("negate nowhere", 3, "nowhere"),
        ("add base math", 2, "not a task vector"),
        ("analogy base math", 2, "C"),
    ],
)
def test_mistakes(run, taus, words: str, code: int, message: str) -> None:
    outcome = run(*words.split())
    assert (outcome.code, outcome.stdout) == (code, "")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
