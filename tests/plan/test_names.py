"""Two spellings of one model's names are bridged where that is possible in one way, else told; renaming by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.errors import RecipeError, TensorMismatchError
from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.testing.checkpoints import tiny_llama_config, tiny_llama_tensors, write_checkpoint

Tensors = Mapping[str, torch.Tensor]

LLAMA, OTHER = tiny_llama_tensors(seed=1), tiny_llama_tensors(seed=2)


def plan_of_two(tmp_path: Path, first: Tensors, second: Tensors, rename: Any = None, **step: Any) -> Plan:
    a = write_checkpoint(tmp_path / "a", first, config=tiny_llama_config())
    b = write_checkpoint(tmp_path / "b", second, config=tiny_llama_config())
    models = {"a": str(a), "b": {"model": str(b), "rename": rename} if rename else str(b)}
    merge = {"method": "linear", "sources": ["a", "b"], **step}
    return build_plan(
        recipe_from_mapping({"models": models, "merge": merge, "output": {"path": str(tmp_path / "out")}})
    )


def written(tmp_path: Path, plan: Plan) -> dict[str, torch.Tensor]:
    run_plan(plan)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: f"language_model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda name: f"policy.actor.{name}",
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_copies_under_two_spellings_are_merged(tmp_path: Path, spelling: Callable[[str], str], turned: bool) -> None:
    respelled = {spelling(name): tensor for name, tensor in OTHER.items()}
    plan = plan_of_two(tmp_path, respelled, LLAMA) if turned else plan_of_two(tmp_path, LLAMA, respelled)
    assert any("are read as those of 'a'" in note for note in plan.notes)
    out = written(tmp_path, plan)
    assert set(out) == ({*respelled} if turned else {*LLAMA})
    for name in LLAMA:
        torch.testing.assert_close(out[spelling(name) if turned else name], (LLAMA[name] + OTHER[name]) / 2)


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    new = {"bert.LayerNorm.weight": torch.ones(4), "bert.LayerNorm.bias": torch.ones(4), "bert.q.weight": torch.ones(4)}
    old = {"LayerNorm.gamma": torch.ones(4), "LayerNorm.beta": torch.zeros(4), "q.weight": torch.ones(4)}
    out = written(tmp_path, plan_of_two(tmp_path, new, old))
    assert set(out) == set(new) and out["bert.LayerNorm.bias"].eq(0.5).all()


def test_two_towers_of_one_shape_are_not_guessed(tmp_path: Path) -> None:
    tower = {"layers.0.q.weight": torch.ones(4, 4), "layers.1.q.weight": torch.ones(4, 4)}
    both = {f"{side}_model.{name}": tensor.clone() for side in ("text", "language") for name, tensor in tower.items()}
    with pytest.raises(TensorMismatchError, match="0 of 4 names are in both"):
        plan_of_two(tmp_path, both, tower)


def test_what_separates_the_names_and_what_would_join_them_is_said(tmp_path: Path) -> None:
    other = {f"decoder.core.{name}": tensor for name, tensor in OTHER.items()} | {"scale": torch.ones(1)}
    with pytest.raises(TensorMismatchError) as caught:
        plan_of_two(tmp_path, LLAMA, other)
    assert "0 of 21 names are in both" in str(caught.value)
    assert '{"decoder.core.*": "*"} would bring 21 of them together' in str(caught.value)


@pytest.mark.parametrize("missing", ["present", "base"])
def test_nothing_in_common_is_no_merge(tmp_path: Path, missing: str) -> None:
    other = {f"decoder.core.{name}": tensor for name, tensor in OTHER.items()} | {"scale": torch.ones(1)}
    with pytest.raises(TensorMismatchError, match="would merge nothing"):
        plan_of_two(tmp_path, LLAMA, other, missing=missing)


def test_a_language_model_goes_into_a_larger_one(tmp_path: Path) -> None:
    tower = {"model.visual.q.weight": torch.ones(4, 4)}
    large = {f"model.text.{name.removeprefix('model.')}": tensor for name, tensor in LLAMA.items()} | tower
    plan = plan_of_two(
        tmp_path,
        large,
        OTHER,
        rename={"model.*": "model.text.*", "lm_head.weight": "model.text.lm_head.weight"},
        base="a",
        missing="base",
    )
    assert any("1 tensors are only in one of 'a' and 'b'" in note for note in plan.notes)
    out = written(tmp_path, plan)
    assert set(out) == set(large) and out["model.visual.q.weight"].eq(1).all()
    torch.testing.assert_close(
        out["model.text.norm.weight"], (LLAMA["model.norm.weight"] + OTHER["model.norm.weight"]) / 2
    )


@pytest.mark.parametrize(
    ("rename", "what"),
    [
        ({"encoder.*": "*"}, "matches none"),
        ({"model.*": "one"}, "another number of"),
        ({"model.layers.*.self_attn.*_proj.weight": "x.*.*", "model.layers.0.mlp.up_proj.weight": "x.0.q"}, "one name"),
    ],
)
def test_renames_that_cannot_be_meant(tmp_path: Path, rename: dict[str, str], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        plan_of_two(tmp_path, LLAMA, OTHER, rename=rename)


@pytest.mark.parametrize("holders", ["a", "b"])
def test_buffers_that_follow_from_the_config_stop_nothing(tmp_path: Path, holders: str) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    buffer = {name: torch.arange(4, dtype=torch.float32)}
    first, second = (dict(LLAMA) | (buffer if holders == "a" else {}), dict(OTHER) | (buffer if holders == "b" else {}))
    plan = plan_of_two(tmp_path, first, second)
    assert any("follow from the config" in note for note in plan.notes)
    merged = written(tmp_path, plan)
    assert torch.equal(merged[name], buffer[name])
    torch.testing.assert_close(
        merged["model.norm.weight"], (LLAMA["model.norm.weight"] + OTHER["model.norm.weight"]) / 2
    )


@pytest.mark.parametrize(
    ("spelling", "rename"),
    [
        (lambda name: f"module.{name}", {"module.*": "*"}),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), {"*_orig_mod.*": "**"}),
    ],
)
def test_wrappers_of_training_that_would_stay_are_told(
    tmp_path: Path, spelling: Callable[[str], str], rename: dict[str, str]
) -> None:
    models = [{spelling(name): value for name, value in model.items()} for model in (LLAMA, OTHER)]
    told = [note for note in plan_of_two(tmp_path, *models).notes if "a wrapper of training" in note]
    assert len(told) == 1 and str(rename).replace("'", '"') in told[0]
    assert not any("a wrapper of training" in note for note in plan_of_two(tmp_path, LLAMA, models[1]).notes)
