from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import make_models, plan_of, recipe
from safetensors.torch import load_file

from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError
from mergekit_px.plan.nodes import Apply
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_models(tmp_path / "models", count=2, layers=4)
    return tmp_path / "models"


def stack(*pieces: tuple[str, str]) -> dict[str, object]:
    slices = [{"sources": [{"model": model, "layers": layers}]} for model, layers in pieces]
    return {"method": "passthrough", "slices": slices}


def test_layers_are_renumbered_and_the_config_follows(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(folder, stack(("fine0", "0-2"), ("fine1", "1-3"))), tmp_path / "out")
    origin = {
        item.name: next(iter(item.reads)).describe() for item in plan.items if item.name.endswith("up_proj.weight")
    }
    assert origin == {
        f"model.layers.{out}.mlp.up_proj.weight": f"{model}:model.layers.{layer}.mlp.up_proj.weight"
        for out, (model, layer) in enumerate(
            [("fine0", 0), ("fine0", 1), ("fine0", 2), ("fine1", 1), ("fine1", 2), ("fine1", 3)]
        )
    }
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 6


def test_names_of_stacked_models_are_bridged_or_refused(folder: Path, tmp_path: Path) -> None:
    deeper = tiny_llama_tensors(layers=6, seed=5)
    config = tiny_llama_config(layers=6)
    write_checkpoint(folder / "wrapped", {f"module.{name}": value for name, value in deeper.items()}, config=config)
    write_checkpoint(folder / "other", {name.replace("layers", "cells"): value for name, value in deeper.items()})
    plan = plan_of(recipe(folder, stack(("fine0", "0-2"), ("wrapped", "2-3"))), tmp_path / "out")
    origin = {item.name: item.reads[0].describe() for item in plan.items}
    assert not any(name.startswith("module.") for name in origin)
    last = "model.layers.{}.mlp.up_proj.weight"
    assert origin[last.format(4)] == f"wrapped:module.{last.format(3)}"
    assert origin["model.norm.weight"] == "wrapped:module.model.norm.weight"
    with pytest.raises(PlanError, match=r"layers are called model\.layers\.0.* and model\.cells\.3"):
        plan_of(recipe(folder, stack(("fine0", "0-2"), ("other", "2-3"))), tmp_path / "out")


def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(folder, stack(("fine0", "0-1"), ("fine1", "2-3"))), tmp_path / "out")
    origin = {item.name: item.reads[0].input for item in plan.items}
    assert origin["model.embed_tokens.weight"] == "fine0"
    assert origin["model.norm.weight"] == origin["lm_head.weight"] == "fine1"


def test_a_slice_without_layers_gives_only_what_is_outside_of_them(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(folder, stack(("fine0", "none"), ("fine1", "0-2"), ("fine0", "none"))), tmp_path / "out")
    origin = {item.name: item.reads[0].input for item in plan.items}
    assert {origin[name] for name in origin if "layers" not in name} == {"fine0"}
    assert {origin[name] for name in origin if "layers" in name} == {"fine1"}
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 3
    with pytest.raises(PlanError, match="no layers at all"):
        plan_of(recipe(folder, stack(("fine0", "none"))), tmp_path / "out")


def test_per_layer_lists_of_the_config_follow_the_layers(folder: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for name in ("fine0", "fine1"):
        config = {**tiny_llama_config(layers=4), "model_type": "unknown-type", "layer_types": kinds}
        (folder / name / "config.json").write_text(json.dumps(config))
    plan = plan_of(recipe(folder, stack(("fine0", "1-2"), ("fine1", "1-1"))), tmp_path / "out")
    assert plan.config is not None
    assert plan.config["layer_types"] == [kinds[1], kinds[2], kinds[1]]


def test_layers_left_out_are_listed(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(folder, stack(("fine0", "0-2"))), tmp_path / "out")
    assert {drop.tensor.split(".")[2] for drop in plan.dropped} == {"3"}
    assert all("no slice" in drop.reason for drop in plan.dropped)


def test_values_are_interpolated_over_a_slice(folder: Path, tmp_path: Path) -> None:
    pieces = [
        {
            "sources": [{"model": "fine0", "layers": "0-2"}, {"model": "fine1", "layers": "0-2"}],
            "params": {"t": [0.0, 1.0]},
        },
        {"sources": [{"model": "fine0", "layers": 3}, {"model": "fine1", "layers": 3}], "params": {"t": 0.25}},
    ]
    plan = plan_of(recipe(folder, {"method": "slerp", "slices": pieces}), tmp_path / "out")
    values = {item.name: item.node.params.t for item in plan.items}  # type: ignore[union-attr]
    assert [values[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [0, 0.5, 1, 0.25]


@pytest.mark.parametrize("layers", ["2-4", "7", "9-"])
def test_layers_that_do_not_exist_are_refused(folder: Path, tmp_path: Path, layers: str) -> None:
    with pytest.raises(PlanError, match="which has 4"):
        plan_of(recipe(folder, stack(("fine0", layers))), tmp_path / "out")


def test_layers_of_another_width_are_refused(folder: Path, tmp_path: Path) -> None:
    """In the models' own tensors, whichever of them are stacked; one size in a model and others is its own affair."""
    wide = {
        name: torch.zeros(48, value.shape[1]) if name.endswith("up_proj.weight") else value
        for name, value in tiny_llama_tensors(seed=1).items()
    }
    write_checkpoint(folder / "wide", wide, config=tiny_llama_config())
    asked = stack(("fine0", "0-1"), ("wide", "1"))
    with pytest.raises(TensorMismatchError, match=r"'mlp.up_proj.weight' is \[.*\] in the layers of 'fine0' and \[48"):
        plan_of(recipe(folder, asked), tmp_path / "out")
    first = "model.layers.0.mlp.up_proj.weight"
    write_checkpoint(folder / "wide", {**wide, first: torch.zeros(24, 32)}, config=tiny_llama_config())
    assert plan_of(recipe(folder, asked), tmp_path / "out").items


def test_sources_of_a_slice_have_as_many_layers_each(folder: Path, tmp_path: Path) -> None:
    pieces = [{"sources": [{"model": "fine0", "layers": "0-2"}, {"model": "fine1", "layers": "0-1"}]}]
    with pytest.raises(RecipeError, match="as many layers each, not 3 of 'fine0', 2 of 'fine1'"):
        plan_of(recipe(folder, {"method": "slerp", "slices": pieces}), tmp_path / "out")
    pieces[0]["sources"][1]["layers"] = "2-"
    with pytest.raises(PlanError, match="as many layers each: 'fine0' 3, 'fine1' 2"):
        plan_of(recipe(folder, {"method": "slerp", "slices": pieces}), tmp_path / "out")


def two_stacks(folder: Path, extra: tuple[str, ...], config: dict[str, object]) -> None:
    """Models ``fine0`` and ``fine1`` with further tensors."""
    for number, name in enumerate(("fine0", "fine1")):
        tensors = tiny_llama_tensors(layers=4, seed=number)
        tensors.update({more: torch.ones(2) for more in extra})
        write_checkpoint(folder / name, tensors, config={**tiny_llama_config(layers=4), **config})


def origins(folder: Path, output: Path, *pieces: tuple[str, str]) -> dict[str, str]:
    plan = plan_of(recipe(folder, stack(*pieces)), output)
    return {item.name: item.reads[0].input for item in plan.items}


@pytest.mark.parametrize("count", [1, 4])
def test_a_stack_beside_the_layers_is_taken_whole_from_the_first_slice(
    folder: Path, tmp_path: Path, count: int
) -> None:
    beside = tuple(f"visual.blocks.{number}.norm.weight" for number in range(count))
    two_stacks(folder, (*beside, "visual.patch_embed.weight", "visual.merger.weight"), {})
    found = origins(folder, tmp_path / "out", ("fine0", "0-3"), ("fine1", "0-1"))
    assert {name: source for name, source in found.items() if "layers" not in name} == {
        **dict.fromkeys((*beside, "visual.patch_embed.weight", "visual.merger.weight"), "fine0"),
        "model.embed_tokens.weight": "fine0",
        "model.norm.weight": "fine1",
        "lm_head.weight": "fine1",
    }


def test_layers_that_the_config_does_not_count_are_not_stacked(folder: Path, tmp_path: Path) -> None:
    two_stacks(folder, ("model.layers.4.eh_proj.weight",), {"num_nextn_predict_layers": 1})
    data = recipe(folder, stack(("fine0", "2-"), ("fine1", "0-")))
    plan = plan_of(data, tmp_path / "out")
    assert plan.config is not None
    assert (plan.config["num_hidden_layers"], plan.config["num_nextn_predict_layers"]) == (6, 0)
    assert {drop.tensor for drop in plan.dropped if "eh_proj" in drop.tensor} == {"model.layers.4.eh_proj.weight"}


def test_several_stacks_of_which_none_is_counted_are_refused(folder: Path, tmp_path: Path) -> None:
    two_stacks(folder, ("encoder.layers.0.w", "encoder.layers.3.w"), {})
    with pytest.raises(PlanError, match=r"encoder\.layers\.\* \(4\), model\.layers\.\* \(4\)"):
        plan_of(recipe(folder, stack(("fine0", "0-1"))), tmp_path / "out")


def test_an_embedding_with_columns_for_every_layer_keeps_layers_in_place(folder: Path, tmp_path: Path) -> None:
    two_stacks(folder, ("model.embed_tokens_per_layer.weight",), {})
    for pieces in ([("fine0", "0-2")], [("fine0", "0-1"), ("fine1", "1-3")], [("fine0", "2-3"), ("fine1", "0-1")]):
        with pytest.raises(PlanError, match="columns for every layer"):
            plan_of(recipe(folder, stack(*pieces)), tmp_path / "out")
    assert "model.layers.3.mlp.up_proj.weight" in origins(folder, tmp_path / "out", ("fine0", "0-1"), ("fine1", "2-3"))


def test_layers_stacked_twice_are_traced_to_their_models(folder: Path, tmp_path: Path) -> None:
    kinds = ["a", "b", "c", "d"]
    config = {**tiny_llama_config(layers=4), "model_type": "unknown-type", "layer_types": kinds}
    (folder / "fine0" / "config.json").write_text(json.dumps(config))
    data = recipe(folder, {})
    data["steps"] = {
        "first": stack(("fine0", "2-3"), ("fine0", "0-3")),
        "second": stack(("first", "1-2"), ("first", "5")),
    }
    plan = plan_of({key: value for key, value in data.items() if key != "merge"}, tmp_path / "out")
    assert plan.config is not None
    assert plan.config["layer_types"] == ["d", "a", "d"]
    read = {item.name: item.reads[0].tensor.name for item in plan.items}
    assert read["model.layers.1.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("tied", ["fine0", "fine1"])
def test_a_head_that_only_some_models_tie_stands_on_its_own(folder: Path, tmp_path: Path, tied: str) -> None:
    """The embedding is the first model's and the head the last one's, whichever of them ties the two."""
    config = tiny_llama_config(layers=4, tied=True)
    write_checkpoint(folder / tied, tiny_llama_tensors(layers=4, tied=True, seed=5), config=config)
    plan = plan_of(recipe(folder, stack(("fine0", "0-2"), ("fine1", "1-3"))), tmp_path / "out")
    read = {item.name: item.reads[0].describe() for item in plan.items}
    assert read["model.embed_tokens.weight"] == "fine0:model.embed_tokens.weight"
    assert read["lm_head.weight"] == ("fine1:lm_head.weight" if tied == "fine0" else "fine1:model.embed_tokens.weight")
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False


def test_what_is_tied_at_both_ends_stays_tied(folder: Path, tmp_path: Path) -> None:
    config = tiny_llama_config(layers=4, tied=True)
    write_checkpoint(folder / "fine0", tiny_llama_tensors(layers=4, tied=True), config=config)
    plan = plan_of(recipe(folder, stack(("fine0", "0-1"), ("fine1", "1-2"), ("fine0", "3"))), tmp_path / "out")
    assert "lm_head.weight" not in {item.name for item in plan.items}
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("end", "config", "fine", "wrong"),
    [
        (0, {}, ("0-2", "1-3"), ("1-3", "0-2")),
        (0, {"layer_types": ["a", "b", "a", "b"]}, ("0-2", "2-3"), ("0-1", "0-3")),
        (3, {}, ("0-2", "1-3"), ("2-3", "0-2")),
    ],
)
def test_a_layer_that_is_special_by_its_place_stays_there(
    folder: Path, tmp_path: Path, end: int, config: dict[str, object], fine: tuple[str, str], wrong: tuple[str, str]
) -> None:
    two_stacks(folder, (f"model.layers.{end}.pre_ln.weight",), {"model_type": "x", **config})
    word = "first" if end == 0 else "last"
    with pytest.raises(PlanError, match=f"the {word} layer of 'fine0' differs from the others by 'pre_ln.weight'"):
        plan_of(recipe(folder, stack(*zip(("fine0", "fine0"), wrong, strict=True))), tmp_path / "out")
    origins(folder, tmp_path / "out", *zip(("fine0", "fine1"), fine, strict=True))


@pytest.mark.parametrize(
    "config", [{"first_k_dense_replace": 1}, {"layer_types": ["a", "b", "b", "b"]}, {"mlp_only_layers": [0]}]
)
def test_a_layer_that_the_config_sets_apart_may_move(folder: Path, tmp_path: Path, config: dict[str, object]) -> None:
    two_stacks(folder, ("model.layers.0.mlp.dense.weight",), {"model_type": "x", **config})
    assert origins(folder, tmp_path / "out", ("fine0", "0-1"), ("fine1", "1-3"))
    assert origins(folder, tmp_path / "out", ("fine0", "0"), ("fine1", "0-3"))


def test_steps_can_be_stacked_too(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, {})
    data["steps"] = {"mean": {"method": "linear", "sources": ["fine0", "fine1"]}, "stacked": stack(("mean", "1-"))}
    plan = plan_of({key: value for key, value in data.items() if key != "merge"}, tmp_path / "out")
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 3


def test_the_config_follows_a_step_over_stacked_steps(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, stack(("fine0", "0-2"), ("fine0", "1-3")))
    data["steps"] = {
        "one": data.pop("merge"),
        "two": stack(("fine1", "0-2"), ("fine1", "1-3")),
        "both": {"method": "linear", "sources": ["one", "two"]},
    }
    plan = plan_of(data, tmp_path / "out")
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 6


def test_a_rule_that_matches_nothing_is_told(folder: Path, tmp_path: Path) -> None:
    rules = [{"match": ["*atention*", "x"], "drop": True}, {"match": "*norm*", "layers": "7", "drop": True}]
    notes = plan_of(recipe(folder, {**stack(("fine0", "0-1")), "rules": rules}), tmp_path / "out").notes
    assert [note for note in notes if "rule" in note] == [
        "the rule for '*atention*' or 'x' matches no tensor of step 'merge'"
    ]


def test_rules_by_depth(folder: Path, tmp_path: Path) -> None:
    step = {
        "method": "linear",
        "sources": {"fine0": 1.0, "fine1": 1.0},
        "rules": [{"depth": [0.5, 1], "weights": {"fine1": 3.0}}],
    }
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    weights = {item.name: item.node.weights for item in plan.items if isinstance(item.node, Apply)}
    changed = {name for name, found in weights.items() if found == (1.0, 3.0)}
    assert {int(name.split(".")[2]) for name in changed if ".layers." in name} == {2, 3}
    assert {"lm_head.weight", "model.norm.weight"} < changed
    assert "model.embed_tokens.weight" not in changed


def test_rules_by_the_depth_in_a_slice(folder: Path, tmp_path: Path) -> None:
    step = {
        "method": "linear",
        "slices": [
            {"sources": [{"model": "fine0", "layers": "0-3"}]},
            {
                "sources": [{"model": "fine0", "layers": "0-3"}, {"model": "fine1", "layers": "0-3"}],
                "rules": [{"depth": [1 / 3, 2 / 3], "weights": {"fine1": 3.0}}],
            },
        ],
    }
    plan = plan_of(recipe(folder, step), tmp_path / "out")
    weights = {item.name: item.node.weights for item in plan.items if isinstance(item.node, Apply)}
    changed = {name for name, found in weights.items() if found == (1.0, 3.0)}
    assert {int(name.split(".")[2]) for name in changed} == {5, 6}


@pytest.mark.parametrize("depth", [[0.5], [0.7, 0.2], [0, 1.5], []])
def test_depths_that_are_none(folder: Path, tmp_path: Path, depth: list[float]) -> None:
    step = {"method": "linear", "sources": ["fine0"], "rules": [{"depth": depth, "weights": [2.0]}]}
    with pytest.raises(RecipeError, match="'depth' must be two numbers from 0 to 1"):
        plan_of(recipe(folder, step), tmp_path / "out")


def test_slices_of_one_of_several_stacks(tmp_path: Path) -> None:
    """An encoder's layers are merged by slices of their own, and keep their places."""
    for number, name in enumerate(("a", "b")):
        parts = [f"{part}.block.{layer}.w" for part in ("encoder", "decoder") for layer in range(3)]
        tensors = {part: torch.full((2, 2), float(number)) for part in parts}
        write_checkpoint(tmp_path / name, tensors, config={"num_layers": 3, "num_decoder_layers": 3})
    sources = [{"model": "a", "layers": "0-2", "weight": [1, 0]}, {"model": "b", "layers": "0-2", "weight": 1}]
    step = {"method": "linear", "stack": ["encoder.*"], "slices": [{"sources": sources}]}
    data = {"models": {name: str(tmp_path / name) for name in "ab"}, "steps": {"merged": step}}
    plan = plan_of(data, tmp_path / "out")
    weights = {item.name: item.node.weights for item in plan.items if isinstance(item.node, Apply)}
    assert [weights[f"encoder.block.{layer}.w"] for layer in range(3)] == [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0)]
    for other, message in (({"layers": 0}, "1 layers of 3"), ({"layers": [2, 1, 0]}, "comes from another place")):
        step["slices"] = [{"sources": [{"model": "a", **other}]}]
        with pytest.raises(PlanError, match=message):
            plan_of(data, tmp_path / "out")
    step["stack"] = ["*.block.*"]
    with pytest.raises(PlanError, match="names 2 stacks"):
        plan_of(data, tmp_path / "out")


def test_an_embedding_and_a_head_of_different_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "fine1" / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    config = json.loads((folder / "fine1/config.json").read_text()) | {"vocab_size": len(tensors["lm_head.weight"])}
    write_checkpoint(folder / "fine1", tensors, config=config)
    with pytest.raises(PlanError, match="embedding and head would have different numbers of rows"):
        plan_of(recipe(folder, stack(("fine0", "0-1"), ("fine1", "2-3"))), tmp_path / "out")
