from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import make_models, plan_of, recipe

from mergekit_px.errors import (
    InputNotFoundError,
    MemoryBudgetError,
    OutputError,
    PlanError,
    RecipeError,
    TensorMismatchError,
)
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.options import PlanOptions
from mergekit_px.plan.report import plan_report
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

LINEAR = {"method": "linear", "sources": ["fine0", "fine1"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_models(tmp_path / "models")
    return tmp_path / "models"


def test_every_tensor_is_planned_under_its_name_shape_and_dtype(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(folder, LINEAR), tmp_path / "out")
    base = tiny_llama_tensors()
    assert {item.name: item.shape for item in plan.items} == {name: tuple(t.shape) for name, t in base.items()}
    assert {item.dtype.name for item in plan.items} == {"BF16"}
    assert plan.dropped == ()
    assert plan.bytes_written == sum(shard.size for shard in plan.layout.shards)


def test_the_donor_of_config_is_the_base_else_the_first_source(folder: Path, tmp_path: Path) -> None:
    assert plan_of(recipe(folder, LINEAR), tmp_path / "out").config_from == "fine0"
    step = {"method": "task_arithmetic", "base": "base", "sources": ["fine1"]}
    assert plan_of(recipe(folder, step), tmp_path / "out").config_from == "base"
    asked = recipe(folder, LINEAR, {"config_from": "fine2"})
    assert plan_of(asked, tmp_path / "out").config_from == "fine2"


def test_later_rules_win_and_take_drop_and_method_do_what_they_say(folder: Path, tmp_path: Path) -> None:
    step = {
        "method": "ties",
        "base": "base",
        "sources": {"fine0": 0.6, "fine1": 0.4},
        "params": {"density": 0.5},
        "rules": [
            {"match": "*.mlp.*", "params": {"density": 0.3}},
            {"match": "*.mlp.up_proj*", "layers": 1, "params": {"density": 0.2}, "weights": {"fine1": 0.9}},
            {"match": "*norm*", "method": "linear"},
            {"match": "lm_head.*", "take": "fine1"},
            {"match": "*q_proj*", "layers": "none", "drop": True},
            {"match": "*.v_proj.*", "drop": True},
        ],
    }
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    nodes = {item.name: item.node for item in plan.items}
    assert nodes["model.layers.0.mlp.up_proj.weight"].params.density == (0.3, 0.3)  # type: ignore[union-attr]
    assert nodes["model.layers.1.mlp.up_proj.weight"].params.density == (0.2, 0.2)  # type: ignore[union-attr]
    assert nodes["model.layers.1.mlp.up_proj.weight"].weights == (0.6, 0.9)  # type: ignore[union-attr]
    assert nodes["model.layers.0.self_attn.q_proj.weight"].params.density == (0.5, 0.5)  # type: ignore[union-attr]
    assert nodes["model.norm.weight"].method.name == "linear"  # type: ignore[union-attr]
    assert nodes["lm_head.weight"].describe() == "fine1:lm_head.weight"
    assert "model.layers.0.self_attn.v_proj.weight" not in nodes
    dropped = {(drop.input, drop.tensor): drop.reason for drop in plan.dropped}
    assert "dropped by a rule" in dropped["base", "model.layers.0.self_attn.v_proj.weight"]
    assert "the output has it from fine1" in dropped["fine0", "lm_head.weight"]


def test_a_rule_for_one_source_leaves_the_others_as_they_are(folder: Path, tmp_path: Path) -> None:
    step = {
        "method": "ties",
        "base": "base",
        "sources": ["fine0", "fine1"],
        "params": {"density": 0.5},
        "rules": [{"match": "*mlp*", "params": {"density": {"fine1": 0.3}}}],
    }
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    found = next(item.node for item in plan.items if "mlp" in item.name)
    assert found.params.density == (0.5, 0.3)  # type: ignore[union-attr]


def test_every_input_tensor_is_read_or_listed_as_dropped(folder: Path, tmp_path: Path) -> None:
    step = {**LINEAR, "rules": [{"match": "*mlp*", "drop": True}, {"match": "lm_head*", "take": "fine0"}]}
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    read = {(leaf.input, leaf.tensor.name) for item in plan.items for leaf in item.reads}
    listed = {(drop.input, drop.tensor) for drop in plan.dropped}
    every = {(name, tensor) for name, source in plan.inputs.items() for tensor in source.checkpoint.tensors}
    assert read | listed == every
    assert not read & listed


def test_lists_follow_the_depth_of_the_layers(tmp_path: Path) -> None:
    make_models(tmp_path / "models", layers=5)
    step = {"method": "slerp", "sources": ["fine0", "fine1"], "params": {"t": [0.0, 1.0]}}
    plan = plan_of(recipe(tmp_path / "models", step), tmp_path / "out")
    found = {item.name: item.node.params.t for item in plan.items}  # type: ignore[union-attr]
    assert [found[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found["model.embed_tokens.weight"] == 0
    assert found["model.norm.weight"] == found["lm_head.weight"] == 1


@pytest.mark.parametrize(
    ("method", "count"), [("task_arithmetic", 3), ("ties", 3), ("dare_ties", 3), ("svd", 2), ("cart", 2)]
)
def test_a_base_left_out_is_asked_for(folder: Path, tmp_path: Path, method: str, count: int) -> None:
    step = {"method": method, "sources": [f"fine{number}" for number in range(count)]}
    if method == "svd":
        step["params"] = {"top_k": 2}  # type: ignore[assignment]
    with pytest.raises(PlanError, match="no base to take them from"):
        plan_of(recipe(folder, step), tmp_path / "out")


def test_spectral_methods_take_the_mean_of_three_sources_for_a_base_left_out(folder: Path, tmp_path: Path) -> None:
    step = {"method": "svd", "sources": ["fine0", "fine1", "fine2"], "params": {"top_k": 2}}
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    assert any("no base given (--base): the mean of fine0, fine1, fine2" in note for note in plan.notes)


def test_the_mean_of_the_sources_may_be_asked_for_as_base(folder: Path, tmp_path: Path) -> None:
    step = {"method": "task_arithmetic", "base": "mean", "sources": ["fine0", "fine1"]}
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    assert any("as asked: the mean of fine0, fine1 is the base" in note for note in plan.notes)
    assert plan.items[0].node.base.method.name == "linear"  # type: ignore[union-attr]


def test_a_base_that_all_cards_name_is_taken(folder: Path, tmp_path: Path) -> None:
    for name in ("fine0", "fine1"):
        (folder / name / "README.md").write_text(f"---\nbase_model: {folder / 'base'}\n---\n# card\n")
    step = {"method": "task_arithmetic", "sources": ["fine0", "fine1"]}
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    assert plan.items[0].node.base.describe().startswith("declared_base:")  # type: ignore[union-attr]
    assert any("cards name" in note for note in plan.notes)


def test_a_tied_head_is_read_from_the_embedding(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_checkpoint(folder / "tied", tiny_llama_tensors(tied=True), config=tiny_llama_config(tied=True))
    write_checkpoint(folder / "untied", tiny_llama_tensors(seed=1), config=tiny_llama_config())
    plan = plan_of(recipe(folder, {"method": "linear", "sources": ["tied", "untied"]}), tmp_path / "out")
    head = next(item for item in plan.items if item.name == "lm_head.weight")
    assert [leaf.describe() for leaf in head.reads] == ["tied:model.embed_tokens.weight", "untied:lm_head.weight"]
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False
    assert any("tied" in note for note in plan.notes)


def test_a_head_that_the_config_takes_for_tied_is_untied(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_checkpoint(folder / "tied", tiny_llama_tensors(tied=True), config=tiny_llama_config(tied=True))
    write_checkpoint(folder / "untied", tiny_llama_tensors(seed=1), config=tiny_llama_config())
    step = {"method": "passthrough", "sources": ["untied"]}
    plan = plan_of(recipe(folder, step, {"config_from": "tied"}), tmp_path / "out")
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False


def test_integer_tensors_are_kept_from_the_base_not_averaged(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "fine")):
        tensors = {"w": torch.ones(4), "position_ids": torch.arange(3) + number, "mask": torch.tensor([True])}
        write_checkpoint(tmp_path / "models" / name, tensors)
    step = {"method": "task_arithmetic", "base": "base", "sources": ["fine"]}
    plan = plan_of(recipe(tmp_path / "models", step), tmp_path / "out")
    kept = {item.name: item.node.describe() for item in plan.items if item.action == "copy"}
    assert kept == {"position_ids": "base:position_ids", "mask": "base:mask"}


def _extra(folder: Path) -> None:
    tensors = tiny_llama_tensors(seed=9, dtype=torch.bfloat16)
    write_checkpoint(folder / "fine1", {**tensors, "extra.weight": torch.ones(3)}, config=tiny_llama_config())


def test_a_tensor_that_one_source_lacks_is_an_error_unless_a_policy_is_given(folder: Path, tmp_path: Path) -> None:
    _extra(folder)
    with pytest.raises(TensorMismatchError, match=r"'extra.weight' is in 'fine1' but not in 'fine0'"):
        plan_of(recipe(folder, LINEAR), tmp_path / "out")
    for policy in ("present", "base"):
        plan = plan_of(recipe(folder, {**LINEAR, "missing": policy}), tmp_path / "out")
        item = next(item for item in plan.items if item.name == "extra.weight")
        assert [leaf.input for leaf in item.reads] == ["fine1"]


def test_shapes_that_differ_are_named_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder / "fine1", tiny_llama_tensors(vocabulary=70), config=tiny_llama_config(vocabulary=70))
    with pytest.raises(TensorMismatchError, match=r"\[64, 32\] in 'fine0' and \[70, 32\] in 'fine1'") as caught:
        plan_of(recipe(folder, LINEAR), tmp_path / "out")
    assert "vocabulary: truncate" in str(caught.value)
    models = [{"model": str(folder / name), "parameters": {"weight": 1}} for name in ("fine0", "fine1")]
    config = json.dumps({"merge_method": "linear", "models": models})
    with pytest.raises(TensorMismatchError) as caught:  # in the words of a config that has no such key
        build_plan(parse_recipe(config, name="m.yml", methods=method_catalog()), PlanOptions(output=tmp_path / "out"))
    assert "give --set steps.merge.vocabulary=truncate to keep" in str(caught.value)
    assert "--set tokenizer.from=union" in str(caught.value) and "`pxmerge convert`" in str(caught.value)
    plan = plan_of(recipe(folder, {**LINEAR, "vocabulary": "truncate"}), tmp_path / "out")
    assert next(item.shape for item in plan.items if item.name == "lm_head.weight") == (64, 32)


def test_quantized_models_are_not_computed_with(folder: Path, tmp_path: Path) -> None:
    config = {**tiny_llama_config(), "quantization_config": {"quant_method": "fp8"}}
    (folder / "fine0" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="stored quantized \\(fp8\\), and none of its tensors is"):
        plan_of(recipe(folder, LINEAR), tmp_path / "out")


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ({"method": "slerp", "sources": ["fine0"]}, RecipeError, "slerp"),
        ({"method": "linear", "sources": ["fine0", "nobody"]}, RecipeError, "nobody"),
        ({"method": "liner", "sources": ["fine0"]}, Exception, "linear"),
        ({"method": "combine", "sources": {"fine0": 0.5}}, RecipeError, "add up to 0.5"),
        ({"method": "slerp", "sources": {"fine0": 1, "fine1": 1}}, RecipeError, "no weights"),
        ({"method": "linear", "sources": {"fine0": 1, "fine1": -1}}, RecipeError, "add up to zero"),
        ({"method": "nuslerp", "sources": {"fine0": 1, "fine1": -1}}, RecipeError, "add up to zero"),
        ({"method": "nuslerp", "sources": {"fine0": 1, "fine1": -3}}, RecipeError, "different signs"),
        ({"method": "karcher", "sources": {"fine0": 3, "fine1": -1}}, RecipeError, "a weight is negative"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused(
    folder: Path, tmp_path: Path, step: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_of(recipe(folder, step), tmp_path / "out")


def test_a_missing_input_is_named(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, {"method": "linear", "sources": ["fine0", "gone"]})
    data["models"]["gone"] = str(tmp_path / "gone")
    with pytest.raises(InputNotFoundError, match="gone"):
        plan_of(data, tmp_path / "out")


def test_models_without_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder / "fine1", {})
    with pytest.raises(PlanError, match="no tensors"):
        plan_of(recipe(folder, LINEAR), tmp_path / "out")


def test_the_output_may_not_be_an_input_or_a_file(folder: Path, tmp_path: Path) -> None:
    for place in (folder / "fine0", folder / "fine1" / "merged"):
        with pytest.raises(OutputError, match="input"):
            plan_of(recipe(folder, LINEAR), place)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    plan_of(recipe(folder, LINEAR), tmp_path / "full")  # answers; what is in the folder is for the run
    with pytest.raises(OutputError, match="file"):
        plan_of(recipe(folder, LINEAR), tmp_path / "full" / "note")


def test_a_budget_too_small_names_the_tensor_and_the_need(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"'.+' needs \d+ MB in all, and the budget is 340\.001 MB.*--memory"):
        plan_of(recipe(folder, LINEAR), tmp_path / "out", memory=340_001_000)
    with pytest.raises(MemoryBudgetError, match=r"the program itself needs 340 MB.*budget is 100 MB.*--memory"):
        plan_of(recipe(folder, LINEAR), tmp_path / "out", memory=100_000_000)


def test_a_smaller_budget_means_smaller_chunks(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(3000, 1000, dtype=torch.bfloat16)}
    for name in ("fine0", "fine1"):
        write_checkpoint(tmp_path / "models" / name, tensors)
    data = recipe(tmp_path / "models", LINEAR)
    wide = plan_of(data, tmp_path / "out", threads=2).budget
    narrow = plan_of(data, tmp_path / "out", threads=2, memory=wide.total - 1_000_000).budget
    assert narrow.chunk < wide.chunk
    assert narrow.total <= wide.total - 1_000_000


def test_the_hash_follows_what_is_done_and_not_how(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, LINEAR)
    first = plan_of(data, tmp_path / "out").hash
    assert plan_of(data, tmp_path / "elsewhere", threads=1, memory=2_000_000_000).hash == first
    assert plan_of(data, tmp_path / "out", dtype="float32").hash != first
    weighted = recipe(folder, {"method": "linear", "sources": {"fine0": 1, "fine1": 2}})
    assert plan_of(weighted, tmp_path / "out").hash != first


def test_the_report_is_json_and_tells_the_essentials(folder: Path, tmp_path: Path) -> None:
    report = json.loads(json.dumps(plan_report(plan_of(recipe(folder, LINEAR), tmp_path / "out"))))
    assert report["inputs"].keys() == {"fine0", "fine1"}
    assert report["tensors"]["merged"] == report["tensors"]["output"] == len(tiny_llama_tensors())
    assert report["bytes_written"] == sum(shard["bytes"] for shard in report["output"]["shards"])
    assert report["memory"]["peak_bytes"] > 0
