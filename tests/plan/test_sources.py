"""What a plan says of sources that are equal, of sums that overshoot, and of values that are copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.testing.checkpoints import tiny_llama_config, tiny_llama_tensors, write_checkpoint

TASK = {"method": "task_arithmetic", "base": "base"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_checkpoint(tmp_path / name, tiny_llama_tensors(seed=seed), config=tiny_llama_config())
    return tmp_path


def plan_of(folder: Path, step: dict[str, Any], **models: Any) -> Plan:
    known = {name: str(folder / name) for name in ("base", "a", "b", "c")} | models
    used = {step.get("base"), *step["sources"]}
    recipe = {"models": {name: known[name] for name in known if name in used}, "merge": step}
    return build_plan(recipe_from_mapping(recipe | {"output": {"path": str(folder / "out")}}))


def said(plan: Plan, words: str) -> list[str]:
    return [note for note in plan.notes if words in note]


def test_one_model_under_two_names_is_told_when_it_is_planned(folder: Path) -> None:
    os.link(folder / "a" / "model.safetensors", folder / "linked.safetensors")
    step = {"method": "linear", "sources": ["a", "again", "linked"]}
    plan = plan_of(folder, step, again=str(folder / "." / "a"), linked=str(folder / "linked.safetensors"))
    assert len(said(plan, "have the same bytes, so this model counts twice")) == 3


def test_copies_are_told_once_their_hashes_are_known(folder: Path) -> None:
    shutil.copytree(folder / "a", folder / "copy")
    plan = plan_of(folder, {"method": "linear", "sources": ["a", "copy", "b"]}, copy=str(folder / "copy"))
    assert not said(plan, "same bytes")
    warnings = run_plan(plan).warnings
    assert warnings == ("the sources 'a' and 'copy' have the same bytes, so this model counts twice",)


@pytest.mark.parametrize(
    ("name", "told"), [("base", "is the base itself"), ("again", "has the same bytes as the base")]
)
def test_a_source_that_is_the_base_is_told(folder: Path, name: str, told: str) -> None:
    plan = plan_of(folder, {**TASK, "sources": [name, "a"]}, again=str(folder / "base"))
    assert said(plan, f"the source '{name}' {told}")
    assert not said(plan_of(folder, {"method": "linear", "sources": ["base", "a"]}), "source")


def test_other_names_make_another_source(folder: Path) -> None:
    renamed = {"model": str(folder / "a"), "rename": {"model.norm.weight": "model.norm.weight"}}
    assert not said(plan_of(folder, {"method": "linear", "sources": ["a", "again"]}, again=renamed), "same bytes")


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({**TASK, "sources": ["a", "b", "c"]}, True),
        ({**TASK, "sources": ["a", "b"]}, False),
        ({**TASK, "sources": {"a": 0.3, "b": 0.3, "c": 0.3}}, False),
        ({**TASK, "sources": ["a", "b", "c"], "params": {"scale": 0.3}}, False),
        ({**TASK, "sources": ["a", "b", "c"], "params": {"normalize": True}}, False),
        ({**TASK, "sources": ["a", "b", "c"], "method": "dare_linear"}, True),
        ({**TASK, "sources": ["a", "b", "c"], "method": "ties"}, False),
        ({**TASK, "sources": ["a", "b", "c"], "method": "svd"}, False),
        ({**TASK, "sources": ["a", "b", "c"], "method": "svd", "params": {"orthogonalise": False}}, True),
        ({**TASK, "sources": ["a", "b", "c"], "method": "subspace_boosting"}, True),
        ({**TASK, "sources": ["a", "b", "c"], "method": "cabs"}, True),
        ({**TASK, "sources": ["a", "b", "c"], "method": "dare_ties"}, True),
        ({**TASK, "sources": ["a", "b", "c"], "method": "dare_ties", "params": {"rescale": "none"}}, False),
        ({**TASK, "sources": ["a", "b", "c"], "method": "della", "params": {"scale": 0.3}}, False),
        ({**TASK, "sources": ["a", "b", "c"], "method": "breadcrumbs_ties", "params": {"divide_by": "nothing"}}, True),
    ],
)
def test_what_goes_too_far_with_many_task_vectors_is_warned_of(folder: Path, step: dict[str, Any], told: bool) -> None:
    assert bool(said(plan_of(folder, step), "which can overshoot")) is told


def test_integers_that_differ_are_counted_and_their_donor_is_named(folder: Path) -> None:
    for name, steps in (("a", 3), ("b", 4)):
        tensors = {"w": torch.ones(2), "steps": torch.tensor(steps), "ids": torch.arange(4)}
        save_file(tensors, folder / f"{name}.safetensors")
    paths = {name: str(folder / f"{name}.safetensors") for name in "ab"}
    plan = plan_of(folder, {"method": "linear", "sources": ["a", "b"]}, **paths)
    (note,) = said(plan, "not merged but copied")
    assert note.startswith("2 tensors are integers") and "1 of them differ" in note and "those of 'a', as steps" in note
    same = plan_of(folder, {"method": "linear", "sources": ["a", "c"]}, a=paths["a"], c=paths["a"])
    assert not said(same, "not merged but copied")


def test_a_pickled_model_beside_an_adapter_is_told(folder: Path) -> None:
    adapter = folder / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(s) for x, s in SHAPES}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, adapter / "pytorch_model.bin")
    plan = plan_of(folder, {**TASK, "sources": ["adapter"]}, adapter=str(adapter))
    assert said(plan, "'adapter' holds an adapter and the PyTorch pickle pytorch_model.bin")


WIDTH = tiny_llama_tensors()["model.layers.0.self_attn.q_proj.weight"].shape
SHAPES = (("A", (2, WIDTH[1])), ("B", (WIDTH[0], 2)))
