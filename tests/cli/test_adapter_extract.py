"""Extracting to files of other programs: names of single files and pipelines, and what their headers say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main

sys.path.append(str(Path(__file__).parents[1] / "plan"))

from pipelines import all_tensors, write_pipeline

SDXL = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (8, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
}
HEADER = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.title": "mine",
    "modelspec.hash_sha256": "0x0",
}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def pair(folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SDXL.items()}
    tuned = {name: each + torch.randn(each.shape, generator=generator) / 10 for name, each in base.items()}
    save_file(base, folder / "a.safetensors", metadata=HEADER)
    save_file(tuned, folder / "b.safetensors")
    return tuned


def test_a_single_file_gives_kohyas_names_and_the_fine_tune_back(tmp_path: Path) -> None:
    tuned = pair(tmp_path)
    a, b, lora, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "lora", "out"))
    assert main(["adapter", "extract", str(a), str(b), "--rank", "8", "-o", str(lora), "-q"]) == 0
    assert {name.partition(".")[0] for name in load_file(lora)} == {
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    }
    told = header(lora)
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora" and "modelspec.title" not in told
    assert main(["adapter", "apply", str(a), str(lora), "-o", str(out), "-q"]) == 0
    found = load_file(out)
    for name, each in tuned.items():
        torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-5)


def test_a_pipeline_gives_each_component_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_pipeline(tmp_path / name, seed) for seed, name in enumerate("ab"))
    words = ["adapter", "extract", str(a), str(b), "--rank", "3", "--exclude", "vae/*", "-o"]
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out"
    assert main([*words, str(tmp_path / "peft")]) == 3 and "is of one part" in capsys.readouterr().err
    assert main([*words, str(lora), "--to", "diffusers"]) == 4 and "--rest drop" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists() and not lora.exists()
    assert main([*words, str(lora), "--to", "diffusers", "--rest", "drop", "-q"]) == 0
    assert {name.rpartition(".lora")[0] for name in load_file(lora)} == {"unet.layers.0", "text_encoder.layers.0"}
    assert main(["adapter", "apply", str(a), str(lora), "-o", str(out), "-q"]) == 0
    found, before, tuned = all_tensors(out), all_tensors(a), all_tensors(b)
    for name, each in before.items():
        changed = name in ("unet/layers.0.weight", "text_encoder/layers.0.weight")
        torch.testing.assert_close(found[name], tuned[name] if changed else each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--to", "kohya", "-o", "lora"], "single file"),
        (["--to", "peft", "-o", "lora.safetensors"], "is a folder"),
        (["--rest", "save", "-o", "lora.safetensors"], "factors alone"),
        (["--base-name", "x", "-o", "lora.safetensors"], "no place"),
    ],
)
def test_what_contradicts_the_format(more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "extract", "a", "b", *more]) == 2 and told in capsys.readouterr().err


def test_headers_stay_true_when_files_are_converted_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"lora_te1_fc.lora_down.weight": torch.ones(2, 4), "lora_te1_fc.lora_up.weight": torch.ones(4, 2)}
    for name, more in {"a": {"ss_epoch": "1"}, "b": {"ss_epoch": "2"}, "c": {"ss_base_model_version": "sd_v1"}}.items():
        save_file(factors, tmp_path / f"{name}.safetensors", metadata=HEADER | more)
    a, b, c, out = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c", "out"))
    assert main(["adapter", "convert", a, "--to", "kohya", "-o", out, "-q"]) == 0
    told = header(Path(out))
    assert told.items() >= {"ss_base_model_version": "sdxl_base_v1-0", "ss_epoch": "1", "ss_network_dim": "2"}.items()
    assert "modelspec.hash_sha256" not in told
    assert main(["adapter", "merge", a, b, "-o", out, "--overwrite", "-q"]) == 0
    told = header(Path(out))
    assert told["ss_base_model_version"] == "sdxl_base_v1-0" and "ss_epoch" not in told
    capsys.readouterr()
    assert main(["adapter", "merge", a, c, "-o", out, "--overwrite"]) == 0
    assert "different bases (sdxl_base_v1-0, sd_v1)" in capsys.readouterr().err
