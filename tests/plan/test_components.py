"""Models in several folders merge as a whole, each part under its own file names, or one component is picked."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import all_tensors, write_pipeline, write_sentence_model
from safetensors.torch import load_file, save_file

from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError, PlanError
from mergekit_px.execute.run import run_plan
from mergekit_px.inspection.verify import verify
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping


def plan_of(tmp_path: Path, models: dict[str, Any], options: PlanOptions | None = None, **step: Any) -> Plan:
    sources = [name for name in models if name != step.get("base")]
    merge = {"method": "linear", "sources": sources, **step}
    output = {"path": str(tmp_path / "out")}
    return build_plan(recipe_from_mapping({"models": models, "merge": merge, "output": output}), options)


def merged(tmp_path: Path, models: dict[str, Any], options: PlanOptions | None = None, **step: Any) -> Path:
    run_plan(plan_of(tmp_path, models, options, **step))
    return tmp_path / "out"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pipelines(tmp_path: Path) -> dict[str, Any]:
    return {name: str(write_pipeline(tmp_path / name, seed)) for seed, name in enumerate("ab")}


def test_a_pipeline_is_merged_as_a_whole(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    out = merged(tmp_path, pipelines)
    a, b, mean = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"), all_tensors(out)
    assert set(mean) == set(a) and len(mean) == 6
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    own = {"README.md", "pxmerge.yaml", "pxmerge.lock.json"}
    assert files(out) == files(tmp_path / "a") | own
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert verify(out).is_intact


def test_each_part_has_shards_and_an_index_of_its_own(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    out = merged(tmp_path, pipelines, PlanOptions(shard_size="48"))
    assert (out / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").is_file()
    index = json.loads((out / "text_encoder" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"layers.0.weight", "out.weight"}
    again = merged(tmp_path / "again", {"a": str(out), "b": str(out)})
    for name, tensor in all_tensors(again).items():
        assert torch.equal(tensor, all_tensors(out)[name])


def test_dtype_is_written_where_a_config_has_it(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    out = merged(tmp_path, pipelines, PlanOptions(dtype="bfloat16"))
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "dtype" not in json.loads((out / "unet" / "config.json").read_text())
    assert {tensor.dtype for tensor in all_tensors(out).values()} == {torch.bfloat16}


def test_rules_select_a_component_by_its_folder(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    out = all_tensors(merged(tmp_path, pipelines, rules=[{"match": "vae/*", "take": "b"}]))
    b = all_tensors(tmp_path / "b")
    assert torch.equal(out["vae/out.weight"], b["vae/out.weight"])
    assert not torch.equal(out["unet/out.weight"], b["unet/out.weight"])


def test_one_component_is_picked(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    models = {name: {"model": path, "component": "unet"} for name, path in pipelines.items()}
    out = merged(tmp_path, models)
    stored = load_file(out / "diffusion_pytorch_model.safetensors")
    a, b = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    torch.testing.assert_close(stored["out.weight"], (a["unet/out.weight"] + b["unet/out.weight"]) / 2)
    assert json.loads((out / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_a_task_vector_of_pipelines_is_added_again(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    models = {name: {"model": path} for name, path in pipelines.items()}
    difference = {"method": "combine", "sources": {"b": 1.0, "a": -1.0}}
    recipe = {"models": models, "steps": {"d": difference}, "output": {"path": str(tmp_path / "vector")}}
    run_plan(build_plan(recipe_from_mapping(recipe)))
    out = merged(tmp_path, {"a": pipelines["a"], "v": str(tmp_path / "vector")}, base="a", method="task_arithmetic")
    b = all_tensors(tmp_path / "b")
    for name, tensor in all_tensors(out).items():
        torch.testing.assert_close(tensor, b[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
@pytest.mark.parametrize("pickled", [False, True])
def test_all_modules_of_sentence_transformers_are_merged(tmp_path: Path, transformer: str, pickled: bool) -> None:
    models = {
        name: str(write_sentence_model(tmp_path / name, seed, transformer=transformer, pickled=pickled))
        for seed, name in enumerate("ab")
    }
    out = merged(tmp_path, models, PlanOptions(allow_pickle=pickled))
    prefix = f"{transformer or '.'}/"
    a, b, mean = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"), all_tensors(out)
    dense = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    torch.testing.assert_close(mean["2_Dense/linear.weight"], (dense[0] + dense[1]) / 2)
    name = f"{prefix}model.norm.weight"
    torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2)
    assert (out / "1_Pooling" / "config.json").is_file() and (out / "modules.json").is_file()
    assert (out / "2_Dense" / "config.json").read_bytes() == (tmp_path / "a" / "2_Dense" / "config.json").read_bytes()
    assert (out / transformer / "config.json").is_file()


def test_pickled_modules_are_refused_unless_allowed(tmp_path: Path) -> None:
    models = {name: str(write_sentence_model(tmp_path / name, 1, pickled=True)) for name in "ab"}
    with pytest.raises(InputError, match=r"2_Dense: pytorch_model\.bin is a PyTorch pickle"):
        plan_of(tmp_path, models)


def test_a_component_that_one_lacks_is_named(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    pipelines["c"] = str(write_pipeline(tmp_path / "c", 3, without="vae"))
    with pytest.raises(PlanError, match="'c' has no component vae, which 'a' has"):
        plan_of(tmp_path, pipelines)
    plan = plan_of(tmp_path, pipelines, base="a", method="task_arithmetic", missing="base")
    assert "vae is only in one of 'a' and 'c'" in plan.notes


def test_a_component_that_the_index_names_must_be_there(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    (tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MalformedCheckpointError, match="component vae, which is missing or holds no weights"):
        plan_of(tmp_path, pipelines)


def test_components_of_other_classes_are_refused(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    pipelines["c"] = str(write_pipeline(tmp_path / "c", 3, classes={"unet": "UNet3DConditionModel"}))
    with pytest.raises(PlanError, match="unet is UNet2DConditionModel in 'a' and UNet3DConditionModel in 'c'"):
        plan_of(tmp_path, pipelines)


def test_two_components_that_are_not_the_same_are_refused(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    models = {"a": str(tmp_path / "a" / "unet"), "b": {"model": pipelines["b"], "component": "vae"}}
    with pytest.raises(PlanError, match="UNet2DConditionModel in 'a' and AutoencoderKL in 'b'"):
        plan_of(tmp_path, models)


def test_a_pipeline_and_one_component_are_not_alike(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"'a' is a model in several folders .*unet.* and 'u' is not"):
        plan_of(tmp_path, {"a": pipelines["a"], "u": str(tmp_path / "b" / "unet")})


def test_an_unknown_component_is_refused_with_those_that_are_there(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    with pytest.raises(InputNotFoundError, match="no component transformer") as raised:
        plan_of(tmp_path, {"a": {"model": pipelines["a"], "component": "transformer"}, "b": pipelines["b"]})
    assert "unet, vae, text_encoder" in str(raised.value)


def test_variants_beside_a_component_are_left_behind(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    for folder in "ab":
        stored = {"out.weight": torch.zeros(2, dtype=torch.float16)}
        for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"):
            save_file(stored, tmp_path / folder / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "all_in_one.safetensors")
    plan = plan_of(tmp_path, pipelines)
    assert len(plan.items) == 6
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in plan.left_behind
    assert "all_in_one.safetensors" in plan.left_behind


@pytest.mark.parametrize("text", ["[]", "3", '{"unet": 5}', '{"../x": ["diffusers", "Y"]}'])
def test_lists_of_parts_by_strangers_lead_nowhere_else(tmp_path: Path, text: str) -> None:
    write_pipeline(tmp_path / "a", 1)
    for name in ("model_index.json", "modules.json"):
        (tmp_path / "a" / name).write_text(text)
    with pytest.raises(InputError, match="holds no weights"):
        plan_of(tmp_path, {"a": str(tmp_path / "a"), "b": str(tmp_path / "a")})


LISTINGS = {
    "vocab.json": lambda tokens: json.dumps({token: place for place, token in enumerate(tokens)}),
    "vocab.txt": "\n".join,
    "tokenizer.json": lambda tokens: json.dumps(
        {"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}, "added_tokens": []}
    ),
    "t5.tiktoken": lambda tokens: "\n".join(f"{b64encode(t.encode()).decode()} {n}" for n, t in enumerate(tokens)),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_pipelines_of_other_tokens_are_refused(tmp_path: Path, pipelines: dict[str, Any], name: str) -> None:
    for model, tokens in (("a", ["x", "y"]), ("b", ["y", "x"])):
        (tmp_path / model / "tokenizer" / "vocab.json").unlink()
        (tmp_path / model / "tokenizer" / name).write_text(LISTINGS[name](tokens))
    with pytest.raises(PlanError, match=r"tokenizer lists other tokens in 'a' than in 'b' \(2 ids differ: 0 is 'x'"):
        plan_of(tmp_path, pipelines)
    models = {name: {"model": path, "component": "unet"} for name, path in pipelines.items()}
    assert len(plan_of(tmp_path, models).items) == 2


def test_tokens_in_another_format_or_other_spaces_are_the_same(tmp_path: Path, pipelines: dict[str, Any]) -> None:
    for model, listing in zip("ab", ("vocab.json", "tokenizer.json"), strict=True):
        (tmp_path / model / "tokenizer" / "vocab.json").unlink()
        (tmp_path / model / "tokenizer" / listing).write_text(LISTINGS[listing](["x", "y"]))
    assert len(plan_of(tmp_path, pipelines).items) == 6


def test_denoisers_that_were_trained_to_predict_other_things_are_told(
    tmp_path: Path, pipelines: dict[str, Any]
) -> None:
    for name, kind in (("a", "epsilon"), ("b", "v_prediction")):
        config = {"prediction_type": kind, "clip_sample": name == "a"}
        (tmp_path / name / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (note,) = [note for note in plan_of(tmp_path, pipelines).notes if "disagrees in" in note]
    assert "prediction_type: 'epsilon' in 'a', 'v_prediction' in 'b'" in note
    with pytest.raises(PlanError, match="disagrees in prediction_type"):
        plan_of(tmp_path, pipelines, PlanOptions(strict=True))
