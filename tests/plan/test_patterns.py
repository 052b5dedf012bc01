"""Patterns as models: a step that lists one gets the checkpoints of a run, in order of step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergekit_px.errors import InputError, PxmergeError, RecipeError
from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

STEPS = (50, 100, 150)


@pytest.fixture(autouse=True)
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama_tensors(layers=1)
    write_checkpoint(Path("base"), base, config=tiny_llama_config(layers=1))
    for step in STEPS:
        path = Path(f"run/checkpoint-{step}")
        write_checkpoint(path, fine_tune(base, step, size=0.01), config=tiny_llama_config(layers=1))


def plan_of(merge: dict[str, Any], **more: Any) -> Plan:
    models = {"base": "./base", "run": {"model": "./run/checkpoint-*"}}
    loaded = recipe_from_mapping({"models": models, "merge": merge, **more}, methods=method_catalog())
    return build_plan(loaded, PlanOptions(output=Path("out")))


def test_a_source_stands_for_all_in_order_of_step() -> None:
    plan = plan_of({"method": "linear", "sources": ["run"]}, output={"config_from": "run"})
    assert list(plan.inputs) == ["run-50", "run-100", "run-150"]
    assert plan.config_from == "run-150"
    assert any("'run' stands for 3 checkpoints, from step 50 to step 150" in note for note in plan.notes)
    run_plan(plan)
    saved = [load_file(f"run/checkpoint-{step}/model.safetensors") for step in STEPS]
    for name, value in load_file("out/model.safetensors").items():
        wanted = sum(tensors[name].double() for tensors in saved) / 3
        assert (value.double() - wanted).abs().max() < 1e-6, name


def test_weights_and_values_by_source_are_those_of_each() -> None:
    step = {
        "method": "ties",
        "base": "base",
        "sources": {"run": 0.25},
        "params": {"density": {"run": 0.5}},
        "rules": [{"match": "*norm*", "weights": {"run": 2}}],
    }
    for item in plan_of(step).items:
        for node in item.applied:
            assert node.weights == ((2.0,) * 3 if "norm" in item.name else (0.25,) * 3)
            assert node.params.density == (0.5,) * 3


def test_the_count_of_sources_is_that_of_the_matches() -> None:
    assert len(plan_of({"method": "multislerp", "sources": ["run"]}).inputs) == 3
    with pytest.raises(RecipeError, match="slerp"):
        plan_of({"method": "slerp", "base": "base", "sources": ["run"]})


@pytest.mark.parametrize(
    "step",
    [
        {"method": "linear", "sources": ["base"], "base": "run"},
        {"method": "linear", "sources": ["base"], "rules": [{"match": "*", "take": "run"}]},
        {"method": "linear", "slices": [{"sources": [{"model": "run", "layers": 0}]}]},
    ],
)
def test_where_one_model_is_wanted_a_pattern_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="'run' is a pattern that stands for 3 models"):
        plan_of(step)


def test_a_run_that_is_none_is_refused() -> None:
    Path("run/checkpoint-100").rename("elsewhere")
    for step in (200, 250, 300):
        write_checkpoint(Path(f"run/checkpoint-{step}"), tiny_llama_tensors(layers=1), config={})
    with pytest.raises(InputError, match="step 100 is missing"):
        plan_of({"method": "linear", "sources": ["run"]})
    for path in Path("run").iterdir():
        path.rename(path.with_name(f"{path.name}.tmp"))
    with pytest.raises(PxmergeError, match="still being written"):
        plan_of({"method": "linear", "sources": ["run"]})
