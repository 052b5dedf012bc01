"""Every method for models on adapters, next to the same method on models that have the adapters in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.methods import load_methods
from mergekit_px.methods.declare import Companions, Method, method_slug

METHODS = load_methods()
SHAPES = {"model.layers.0.mlp.up_proj": (12, 8), "model.layers.1.mlp.up_proj": (12, 8)}
OTHERS = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
NAMES = ("one", "two", "three")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_model(folder: str, tensors: dict[str, torch.Tensor]) -> None:
    Path(folder).mkdir()
    save_file(tensors, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in float64 (so that differences of models are as exact as adapters), three adapters of different ranks on
    it, and three models of what they change, with the change in them, computed here densely.

    What no adapter changes is no part of their task vectors: the share that is trimmed is one of the adapted tensors.
    """
    monkeypatch.chdir(tmp_path)
    base = {f"{name}.weight": draw(number, *shape).double() for number, (name, shape) in enumerate(SHAPES.items())}
    base |= {name: draw(20 + number, *shape).double() for number, (name, shape) in enumerate(OTHERS.items())}
    write_model("base", base)
    write_model("adapted-part", {f"{name}.weight": base[f"{name}.weight"] for name in SHAPES})
    for number, name in enumerate(NAMES):
        rank, factors, tuned = number + 2, {}, {}
        for place, (module, shape) in enumerate(SHAPES.items()):
            a, b = draw(100 * number + place, rank, shape[1]), draw(100 * number + 50 + place, shape[0], rank)
            prefix = f"base_model.model.{module}"
            factors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            tuned[f"{module}.weight"] = base[f"{module}.weight"] + 2 * b.double() @ a.double()
        write_model(f"{name}-model", tuned)
        Path(name).mkdir()
        save_file(factors, f"{name}/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base"}
        Path(name, "adapter_config.json").write_text(json.dumps(config))


def write_statistics(kind: Companions, count: int) -> list[str]:
    files = []
    for number in range(count):
        shapes = {f"{module}.weight": kind.shape(shape) for module, shape in SHAPES.items()}
        tensors = {}
        for place, (name, shape) in enumerate(shapes.items()):
            root = draw(1000 * number + place, *shape)
            tensors[name + kind.suffix] = root @ root.T if len(shape) == 2 and shape[0] == shape[1] else root.square()
        files.append(f"statistics{number}.safetensors")
        save_file(tensors, files[-1])
    return files


def line(method: Method, names: list[str]) -> list[Any]:
    statistics = [] if method.companions is None else write_statistics(method.companions, len(names))
    return [method_slug(method.name), "--sources", *names, *statistics]


def number_of_sources(method: Method) -> int:
    least, most = method.sources
    return min(max(least, len(NAMES)), most or len(NAMES))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "combine"])
def test_adapters_are_merged_as_the_models_that_have_them(run, sources, name: str) -> None:
    method = METHODS[name]
    chosen = list(NAMES[: number_of_sources(method)])
    done = run(*line(method, chosen), "--base", "base", "--dtype", "float64", "-o", "out")
    assert done.code == 0, done.stderr
    models = [f"{each}-model" for each in chosen]
    wanted = run(*line(method, models), "--base", "adapted-part", "--dtype", "float64", "-o", "wanted")
    assert wanted.code == 0, wanted.stderr
    found, expected, base = (load_file(f"{folder}/model.safetensors") for folder in ("out", "wanted", "base"))
    assert found.keys() == base.keys()
    for tensor in OTHERS:
        torch.testing.assert_close(found[tensor], base[tensor], rtol=1e-12, atol=0)
    for tensor, value in expected.items():
        assert (value - base[tensor]).norm() > 1e-4
        torch.testing.assert_close(found[tensor], value, rtol=0, atol=2e-5, msg=lambda text, t=tensor: f"{t}: {text}")
    # the base that the adapters name is the base where none is given
    assert run(*line(method, chosen), "--dtype", "float64", "-o", "found").code == 0
    assert Path("found/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_a_combination_of_adapters_is_a_task_vector(run, sources) -> None:
    done = run("combine", "--base", "base", "--sources", "one", "two", "--weights", 0.5, -2, "-o", "vector")
    assert done.code == 0, done.stderr
    found, base = load_file("vector/model.safetensors"), load_file("base/model.safetensors")
    assert found.keys() == base.keys()
    for tensor in OTHERS:
        assert not found[tensor].any()
    for module in SHAPES:
        tensor = f"{module}.weight"
        one, two = (load_file(f"{name}-model/model.safetensors")[tensor] - base[tensor] for name in NAMES[:2])
        torch.testing.assert_close(found[tensor].double(), 0.5 * one - 2 * two, rtol=0, atol=2e-5)
    assert run("add", "base", "vector", "-o", "sum").code == 0
    summed = run("combine", "--base", "base", "--sources", "base", "one", "two", "--weights", 1, 0.5, -2, "-o", "same")
    assert summed.code == 0, summed.stderr
    for folder in ("sum", "same"):
        tensor = load_file(f"{folder}/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        vector = found["model.layers.0.mlp.up_proj.weight"]
        torch.testing.assert_close(tensor, base["model.layers.0.mlp.up_proj.weight"] + vector, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_that_name_no_base_need_one(run, sources, name: str) -> None:
    method = METHODS[name]
    chosen = list(NAMES[: number_of_sources(method)])
    for each in chosen:
        config = json.loads(Path(each, "adapter_config.json").read_text())
        Path(each, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused = run(*line(method, chosen), "-o", "out")
    assert (refused.code, refused.stderr.count("\n")) == (4, 1)
    assert "need the model that they were trained on" in refused.stderr and "--base" in refused.stderr
