"""``pxmerge svd --as lora``, and adapters as sources of a pool."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.adapters.save import save_peft
from mergekit_px.cli import main
from mergekit_px.testing import fine_tune, write_checkpoint


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(3, 5, 3)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(self.wte(x)))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Small()
    write_checkpoint("base", model.state_dict())
    for seed, name in enumerate("abc"):
        write_checkpoint(name, fine_tune(model.state_dict(), seed, size=0.05))
    return model


def svd(*words: object) -> int:
    return main(["svd", "-q", *map(str, words)])


@pytest.mark.parametrize("variant", [(), ("--no-orthogonalise", "--scale", 0.5), ("--calibrate", "svc")])
def test_peft_gives_the_merged_model(base: Small, variant: tuple[object, ...]) -> None:
    words = ("--base", "base", "--sources", "a", "b", "c", "--top-k", 4, *variant)
    assert svd(*words, "-o", "model") == 0
    assert svd(*words, "--as", "lora", "-o", "adapter") == 0
    merged = peft.PeftModel.from_pretrained(base, "adapter").merge_and_unload().state_dict()
    wanted = load_file("model/model.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        expected = load_file("base/model.safetensors")[name] if name == "wte.weight" else tensor
        torch.testing.assert_close(merged[name], expected, atol=2e-6, rtol=0)
    assert {len(t) for name, t in load_file("adapter/adapter_model.safetensors").items() if "lora_A" in name} == {4}


def test_embeddings_left_out_are_named(base: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["svd", "--base", "base", "--sources", "a", "b", "--as", "lora", "-o", "adapter"]) == 0
    assert "not in the adapter: wte.weight" in capsys.readouterr().err


def test_a_split_has_no_adapter(base: Small, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--base", "base", "--sources", "a", "b", "--as", "lora", "--set", "merge.rules=[{match: 'up.*', params: ")
    assert svd(*words[:-1], words[-1] + "{split: 2}}]", "-o", "adapter") == 2
    assert "has no matrices in parts" in capsys.readouterr().err
    assert not Path("adapter").exists()


def test_adapters_are_pooled_by_their_factors(base: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pool as of the models that they make; the second of them leaves ``up`` alone."""
    generator = torch.Generator().manual_seed(5)

    def module(name: str, rows: int, columns: tuple[int, ...]) -> LoraModule:
        a = torch.randn(2, *columns, generator=generator)
        return LoraModule(name, a, torch.randn(rows, 2, *[1] * (len(columns) - 1), generator=generator), alpha=1.0)

    save_peft(Path("x"), [module("up", 10, (6,)), module("conv", 5, (3, 3, 3))])
    save_peft(Path("y"), [module("conv", 5, (3, 3, 3))])
    for name in "xy":
        assert main(["linear", "-q", "--sources", name, "--base", "base", "-o", f"full-{name}"]) == 0
    words = ("--base", "base", "--top-k", 3, "--as", "components")
    assert svd("--sources", "full-x", "full-y", *words, "-o", "dense") == 0
    with monkeypatch.context() as patch:
        patch.setattr("mergekit_px.kernels.pool.truncated_svd", None)  # no dense decomposition
        assert svd("--sources", "x", "y", *words, "-o", "factored") == 0
        assert svd("--sources", "y", *words, "-o", "grown") == 0
        assert svd("--into", "grown", "--sources", "x") == 0
    found, dense, grown = (load_file(f"{name}/components.safetensors") for name in ("factored", "dense", "grown"))
    for name in ("up.weight", "conv.weight"):
        expected = product(dense, name)
        torch.testing.assert_close(product(found, name), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(product(grown, name), expected, atol=1e-5, rtol=0)


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return (tensors[f"{name}.U"] * tensors[f"{name}.S"]) @ tensors[f"{name}.V"].T
