"""Adapters on a whole pipeline: each component gets its own part of the file, or the whole is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "plan"))

from pipelines import all_tensors, write_pipeline, write_sentence_model

A, B = torch.randn(2, 3, generator=torch.Generator().manual_seed(5)), torch.ones(4, 2)


def lora(folder: Path, *prefixes: str) -> Path:
    tensors = {
        f"{prefix}layers_0.lora_{leaf}.weight": each.clone() for prefix in prefixes for leaf, each in UP_AND_DOWN
    }
    tensors |= {f"{prefix}layers_0.alpha": torch.tensor(2.0) for prefix in prefixes}
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


UP_AND_DOWN = (("down", A), ("up", B))


def test_every_component_gets_its_own_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_pipeline(tmp_path / "base", 1)
    file = lora(tmp_path, "lora_unet_", "lora_te_")
    assert main(["adapter", "apply", str(base), str(file), "-o", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    for name, tensor in before.items():
        changed = name in ("unet/layers.0.weight", "text_encoder/layers.0.weight")
        torch.testing.assert_close(after[name], tensor + B @ A if changed else tensor)


def test_an_adapter_is_a_source_over_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_pipeline(tmp_path / "base", 1)
    words = ["task-arithmetic", "--base", str(base), "--sources", str(lora(tmp_path, "lora_unet_")), "--weights", "0.5"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    torch.testing.assert_close(after["unet/layers.0.weight"], before["unet/layers.0.weight"] + 0.5 * B @ A)
    assert torch.equal(after["vae/layers.0.weight"], before["vae/layers.0.weight"])


@pytest.mark.parametrize(
    ("prefixes", "told"),
    [
        (("lora_unet_", "lora_te2_"), "it is for text_encoder_2 too, and the model has unet, vae, text_encoder"),
        (("lycoris_",), "it does not say for which of unet, vae, text_encoder it is"),
    ],
)
def test_what_fits_no_component_is_refused(
    tmp_path: Path, prefixes: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_pipeline(tmp_path / "base", 1)
    assert main(["adapter", "apply", str(base), str(lora(tmp_path, *prefixes)), "-o", str(tmp_path / "out")]) == 3
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_component_of_the_pipeline_takes_its_part(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", 1)
    model = {"model": str(base), "component": "unet", "adapter": str(lora(tmp_path, "lora_unet_", "lora_te_"))}
    recipe = {"models": {"m": model}, "merge": {"method": "passthrough", "sources": ["m"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) == 0
    before, after = all_tensors(base), all_tensors(tmp_path / "out")
    torch.testing.assert_close(after["./layers.0.weight"], before["unet/layers.0.weight"] + B @ A)


def test_an_adapter_of_a_transformer_meets_that_of_a_sentence_model(tmp_path: Path) -> None:
    base = write_sentence_model(tmp_path / "base", 1)
    before = all_tensors(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    out, inside = before[f"./{name}"].shape
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    down, up = torch.ones(2, inside), torch.ones(out, 2)
    save_file({f"{prefix}A.weight": down, f"{prefix}B.weight": up}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["adapter", "apply", str(base), str(adapter), "-o", str(tmp_path / "out")]) == 0
    after = all_tensors(tmp_path / "out")
    torch.testing.assert_close(after[f"./{name}"], before[f"./{name}"] + up @ down)
    assert torch.equal(after["2_Dense/linear.weight"], before["2_Dense/linear.weight"])
