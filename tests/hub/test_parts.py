"""Models in several folders on the Hub: planned by their headers, fetched whole, or one component alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import FakeHub
from merging import W, check, of_module
from pipelines import all_tensors, write_pipeline, write_sentence_model
from quantise import bnb4, gptq
from safetensors.torch import save

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError
from mergekit_px.execute.run import run_plan
from mergekit_px.hub.fetch import fetch, pull
from mergekit_px.hub.reference import HubReference
from mergekit_px.hub.resolve import remote_checkpoint, resolve
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping


def upload(hub: FakeHub, repo: str, folder: Path, **more: bytes) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add(repo, files | {name.replace("__", "/").replace("_dot_", "."): body for name, body in more.items()})


@pytest.fixture
def pipelines(hub: FakeHub, tmp_path: Path) -> dict[str, Path]:
    folders = {}
    for seed, name in enumerate("ab"):
        folders[name] = write_pipeline(tmp_path / name, seed)
        variant = (folders[name] / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        upload(hub, f"org/{name}", folders[name], unet__diffusion_pytorch_model_dot_fp16_dot_safetensors=variant)
    return folders


def merged(tmp_path: Path, models: dict[str, Any]) -> Path:
    step = {"method": "linear", "sources": [*models]}
    recipe = {"models": models, "merge": step, "output": {"path": str(tmp_path / "out")}}
    run_plan(build_plan(recipe_from_mapping(recipe), PlanOptions()))
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["pipeline", "sentence"])
def test_remote_headers_say_what_the_fetched_folder_is(hub: FakeHub, tmp_path: Path, kind: str) -> None:
    write = write_pipeline if kind == "pipeline" else write_sentence_model
    upload(hub, "org/model", write(tmp_path / "model", 1))
    resolved = resolve(HubReference("org/model"))
    remote = remote_checkpoint(resolved)
    local = open_checkpoint(fetch(resolved), label=remote.label)
    assert remote.tensors == local.tensors and remote.files.keys() == local.files.keys()
    assert remote.parts.keys() == local.parts.keys() and remote.configs == local.configs
    assert remote.side_files == local.side_files


def test_pipelines_are_merged_from_the_hub(hub: FakeHub, tmp_path: Path, pipelines: dict[str, Path]) -> None:
    out = merged(tmp_path, {"a": "org/a", "b": "org/b"})
    a, b = (all_tensors(folder) for folder in pipelines.values())
    for name, tensor in all_tensors(out).items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert not hub.asked("resolve", "fp16")


def test_one_component_is_fetched_alone(hub: FakeHub, tmp_path: Path, pipelines: dict[str, Path]) -> None:
    out = merged(tmp_path, {name: {"model": f"org/{name}", "component": "vae"} for name in "ab"})
    a, b = (all_tensors(folder) for folder in pipelines.values())
    mean = all_tensors(out)
    assert mean.keys() == {"./layers.0.weight", "./out.weight"}
    torch.testing.assert_close(mean["./out.weight"], (a["vae/out.weight"] + b["vae/out.weight"]) / 2)
    assert not hub.asked("resolve", "unet")


def test_a_component_that_is_not_there_is_refused(hub: FakeHub, tmp_path: Path, pipelines: dict[str, Path]) -> None:
    with pytest.raises(InputNotFoundError, match="no component transformer"):
        merged(tmp_path, {"a": {"model": "org/a", "component": "transformer"}, "b": "org/b"})


def test_a_listed_component_without_weights_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "model", 1)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    upload(hub, "org/model", folder)
    with pytest.raises(MalformedCheckpointError, match="component vae"):
        remote_checkpoint(resolve(HubReference("org/model")))


def test_a_pulled_pipeline_is_whole(hub: FakeHub, tmp_path: Path, pipelines: dict[str, Path]) -> None:
    copy = pull("org/a", local_dir=tmp_path / "copy")
    assert all_tensors(copy).keys() == all_tensors(pipelines["a"]).keys()
    assert (copy / "tokenizer" / "vocab.json").is_file()


def test_quantised_models_are_planned_by_their_settings_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """GPTQ's settings in a file of their own, and bitsandbytes' in a tensor."""
    rng = np.random.default_rng(1)
    stored, values = gptq(rng, 32, 64, version=2)
    more, others = bnb4(rng, (64, 64))
    tensors = of_module(stored) | of_module(more, "model.layers.0.mlp.down_proj.weight")
    settings = json.dumps({"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}).encode()
    hub.add("org/q", {"model.safetensors": save(tensors), "quantize_config.json": settings})
    recipe = {"models": {"q": "org/q"}, "merge": {"method": "linear", "sources": ["q"]},
              "output": {"path": str(tmp_path / "out"), "dtype": "float32"}}  # fmt: skip
    plan = build_plan(recipe_from_mapping(recipe), PlanOptions())
    assert hub.sent("model.safetensors") < len(save(tensors)) // 2
    run_plan(plan)
    out = all_tensors(tmp_path / "out")
    check(out[f"./{W}"], values)
    np.testing.assert_allclose(out["./model.layers.0.mlp.down_proj.weight"].numpy(), others, rtol=1e-6, atol=1e-7)
