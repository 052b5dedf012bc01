from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, make_models, merge, recipe
from safetensors.torch import save_file

from mergekit_px.errors import AdapterError, PlanError
from mergekit_px.plan.budget import BLOCK
from mergekit_px.testing import write_checkpoint

RANK = 4
Case = tuple[Path, Tensors, list[Tensors]]


def make_adapter(folder: Path, base: Tensors, seed: int, *, alpha: float = 8.0, names: str = "mlp") -> Tensors:
    """A LoRA on every matrix with ``names`` in its name; returns its exact changes in float64."""
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    changes: Tensors = {}
    for name, tensor in base.items():
        if names in name and tensor.dim() == 2:
            a = torch.randn(RANK, tensor.shape[1], generator=generator) * 0.1
            b = torch.randn(tensor.shape[0], RANK, generator=generator) * 0.1
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            changes[name] = alpha / RANK * b.double() @ a.double()
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in changes})
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


@pytest.fixture
def made(tmp_path: Path) -> Case:
    base = make_models(tmp_path / "models", count=1, dtype=torch.float32)["base"]
    changes = [make_adapter(tmp_path / f"lora{n}", base, n, names=names) for n, names in enumerate(("mlp", "_proj"))]
    return tmp_path, base, changes


def with_models(folder: Path, step: dict[str, Any], **models: Any) -> dict[str, Any]:
    data = recipe(folder / "models", step)
    data["models"].update(models)
    return data


def expect(base: Tensors, *changes: tuple[float, Tensors]) -> Tensors:
    return {
        name: value.double() + sum(scale * change[name] for scale, change in changes if name in change)
        for name, value in base.items()
    }


def assert_close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_model_with_an_adapter_is_an_input(made: Case) -> None:
    folder, base, changes = made
    model = {"model": str(folder / "models" / "base"), "adapter": str(folder / "lora0")}
    data = with_models(folder, {"method": "passthrough", "sources": ["adapted"]}, adapted=model)
    assert_close(merge(data, folder / "out"), expect(base, (1, changes[0])))


def test_adapters_are_applied_in_order(made: Case) -> None:
    folder, base, changes = made
    model = {"model": str(folder / "models" / "base"), "adapter": [str(folder / "lora0"), str(folder / "lora1")]}
    data = with_models(folder, {"method": "passthrough", "sources": ["adapted"]}, adapted=model)
    assert_close(merge(data, folder / "out"), expect(base, (1, changes[0]), (1, changes[1])))


@pytest.mark.parametrize("method", ["task_arithmetic", "combine"])
def test_adapters_alone_are_task_vectors(made: Case, method: str) -> None:
    folder, base, changes = made
    sources = {"lora0": 0.5, "lora1": -0.25}
    step: dict[str, Any] = {"method": method, "base": "base", "sources": sources}
    if method == "combine":
        step["sources"] = {"base": 1.0, **sources}
    data = with_models(folder, step, lora0=str(folder / "lora0"), lora1={"adapter": str(folder / "lora1")})
    assert_close(merge(data, folder / "out"), expect(base, (0.5, changes[0]), (-0.25, changes[1])))


def test_methods_on_weights_take_an_adapter_as_the_base_with_it(
    made: Case,
) -> None:
    folder, base, changes = made
    step = {"method": "linear", "base": "base", "sources": ["lora0", "lora1"]}
    data = with_models(folder, step, lora0=str(folder / "lora0"), lora1=str(folder / "lora1"))
    assert_close(merge(data, folder / "out"), expect(base, (0.5, changes[0]), (0.5, changes[1])))


def test_the_base_that_the_adapters_name_is_found(made: Case) -> None:
    folder, base, changes = made
    config = json.loads((folder / "lora0" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "models" / "base")
    (folder / "lora0" / "adapter_config.json").write_text(json.dumps(config))
    data = with_models(folder, {"method": "task_arithmetic", "sources": ["lora0"]}, lora0=str(folder / "lora0"))
    assert_close(merge(data, folder / "out"), expect(base, (1, changes[0])))
    data = with_models(folder, {"method": "task_arithmetic", "sources": ["lora1"]}, lora1=str(folder / "lora1"))
    with pytest.raises(PlanError, match="--base"):
        merge(data, folder / "out2")


def test_large_tensors_are_adapted_in_pieces_to_the_same_bytes(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(3 * BLOCK // 100 + 7, 100)}
    write_checkpoint(tmp_path / "models" / "base", base)
    changes = make_adapter(tmp_path / "lora", base, 0, names="a.weight")
    model = {"model": str(tmp_path / "models" / "base"), "adapter": str(tmp_path / "lora")}
    data = with_models(tmp_path, {"method": "passthrough", "sources": ["adapted"]}, adapted=model)
    whole = merge(data, tmp_path / "out", threads=1)
    assert_close(whole, expect(base, (1, changes)))
    pieces = merge(data, tmp_path / "pieces", threads=3, memory=420_000_000)
    assert torch.equal(whole["a.weight"], pieces["a.weight"])


def test_an_adapter_for_another_model_is_refused(made: Case) -> None:
    folder, _, _ = made
    write_checkpoint(folder / "models" / "other", {"something.weight": torch.ones(4, 4)})
    model = {"model": str(folder / "models" / "other"), "adapter": str(folder / "lora0")}
    data = with_models(folder, {"method": "passthrough", "sources": ["adapted"]}, adapted=model)
    with pytest.raises(AdapterError):
        merge(data, folder / "out")
