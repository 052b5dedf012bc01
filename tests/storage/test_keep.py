"""`quantize: keep`: values are written as the first model stores them, no worse than quantising the merge once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import of_module
from quantise import bnb4, floats8, gptq, mxfp4, quantisation
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main

Tensors = Mapping[str, torch.Tensor]
F8, F32 = torch.float8_e4m3fn, torch.float32
SHAPE = (300, 200)
SCHEMES: dict[str, tuple[str, tuple[int, ...], tuple[int, int], torch.dtype, torch.dtype]] = {
    "tensor": ("weight_scale", (), SHAPE, F8, F32),
    "channel": ("weight_scale", (300, 1), (1, 200), F8, torch.bfloat16),
    "flat": ("weight_scale", (300,), (1, 200), F8, F32),
    "column": ("weight_scale", (1, 200), (300, 1), F8, F32),
    "block": ("weight_scale_inv", (3, 2), (128, 128), F8, F32),
    "powers": ("weight_scale_inv", (3, 2), (128, 128), F8, torch.float8_e8m0fnu),
    "comfy": ("scale_weight", (1,), SHAPE, torch.float8_e5m2, F32),
    "int8": ("weight_scale", (300, 1), (1, 200), torch.int8, F32),
}
"""Name of a module -> its scales' name and shape, what shares one, dtypes of codes and scales."""
CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def model(seed: int) -> dict[str, torch.Tensor]:
    """A model that has every scheme, something plain, and a scale of activations."""
    rng = np.random.default_rng(seed)
    stored: dict[str, torch.Tensor] = {}
    for name, (leaf, grid, _, codes, scales) in SCHEMES.items():
        own = (
            floats8(rng, SHAPE, codes) if codes.is_floating_point else torch.from_numpy(rng.integers(-127, 128, SHAPE))
        )
        chosen = 2.0 ** rng.integers(-9, -5, grid) if scales.itemsize == 1 else rng.uniform(0.001, 0.01, grid)
        parts = {"": own.to(codes), f"!{leaf}": torch.tensor(chosen, dtype=F32).to(scales)}
        stored |= of_module(parts, f"layers.0.{name}.weight")
    experts, _ = mxfp4(rng, 2, 8, 96)
    stored |= of_module(experts, "layers.0.experts.up")
    packed, _ = mxfp4(rng, 1, 8, 96)
    packed = {"!weight_packed": packed["_blocks"].reshape(8, 48), "!weight_scale": packed["_scales"][0]}
    stored |= of_module(packed, "layers.0.packed.weight")
    return stored | {
        "layers.0.tensor.input_scale": torch.tensor(float(seed)),
        "layers.0.zeros.weight": torch.zeros(SHAPE).to(F8),
        "layers.0.zeros.weight_scale": torch.ones(()),
        "norm.weight": torch.full((4,), float(seed), dtype=torch.bfloat16),
    }


def write(folder: Path, stored: Tensors, config: Any = None) -> Path:
    folder.mkdir()
    save_file({name: each.contiguous() for name, each in stored.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*words: object) -> dict[str, torch.Tensor]:
    assert main([*map(str, words), "--quiet", "--memory", "500MB"]) == 0
    return load_file(Path(str(words[-1])) / "model.safetensors")


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """What a model decodes to, by the reader."""
    found = run("linear", "--sources", folder, "--dtype", "float32", "-o", folder.with_suffix(".plain"))
    return {name: each.double() for name, each in found.items()}


def rounded(value: torch.Tensor, sides: tuple[int, int], codes: torch.dtype, scales: torch.dtype) -> torch.Tensor:
    """An exact value quantised once, block by block, in float64."""
    out = torch.empty_like(value)
    top = torch.finfo(codes).max if codes.is_floating_point else 127
    for row in range(0, value.shape[0], sides[0]):
        for column in range(0, value.shape[1], sides[1]):
            block = value[row : row + sides[0], column : column + sides[1]]
            scale = block.abs().max() / top
            scale = 2 ** scale.log2().ceil() if scales.itemsize == 1 else scale.to(scales).double()
            inside = (block / scale).clamp(-top, top)
            inside = inside.to(codes) if codes.is_floating_point else inside.round()
            out[row : row + sides[0], column : column + sides[1]] = inside.double() * scale
    return out


def rounded_mx(value: torch.Tensor) -> torch.Tensor:
    """The same for MXFP4, blocks along the last axis, as its specification chooses scales."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    blocks = value.reshape(-1, 32)
    scales = 2.0 ** (blocks.abs().amax(1, keepdim=True).log2().floor() - 2)
    near = grid[((blocks / scales).abs()[..., None] - grid).abs().argmin(-1)]
    return (near * blocks.sign() * scales).reshape(value.shape)


def test_every_scheme(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, model(seed), CONFIG) for seed, name in enumerate("ab"))
    out = run("linear", "--sources", a, b, "--quantize", "keep", "-o", tmp_path / "out")
    first = load_file(a / "model.safetensors")
    assert {name: (each.dtype, each.shape) for name, each in out.items()} == {
        name: (each.dtype, each.shape) for name, each in first.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert out["layers.0.tensor.input_scale"] == 0 and float(out["norm.weight"][0]) == 0.5
    one, other, found = plain(a), plain(b), plain(tmp_path / "out")
    assert not found["layers.0.zeros.weight"].any()
    for name, (_, _, sides, codes, scales) in SCHEMES.items():
        tensor = f"layers.0.{name}.weight"
        exact = (one[tensor] + other[tensor]) / 2
        once = rounded(exact, sides, codes, scales)
        assert 0 < (found[tensor] - exact).norm() <= 1.001 * (once - exact).norm(), name
    for tensor in ("layers.0.experts.up", "layers.0.packed.weight"):
        exact = (one[tensor] + other[tensor]) / 2
        turned = exact if "packed" in tensor else exact.transpose(-1, -2)
        once = rounded_mx(turned) if "packed" in tensor else rounded_mx(turned).transpose(-1, -2)
        assert 0 < (found[tensor] - exact).norm() <= (once - exact).norm() * (1 + 1e-9), tensor


def test_scales_over_more_rows_than_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("tensor", "column", "block")
    a, b = (
        write(
            tmp_path / name, {key: each for key, each in model(seed).items() if any(f".{part}" in key for part in some)}
        )
        for seed, name in enumerate("ab")
    )
    words = ["ties", "--base", a, "--sources", b, "--density", "0.5", "--quantize", "keep"]
    joint = run(*words, "-o", tmp_path / "joint")
    for place, size in {"_JOINT": 1 << 12, "BLOCK": 1 << 12, "DEFAULT_CHUNK": 1 << 14}.items():
        monkeypatch.setattr(f"mergekit_px.plan.budget.{place}", size)
    swept = run(*words, "-o", tmp_path / "swept")
    for name, each in joint.items():
        assert torch.equal(each.reshape(-1).view(torch.uint8), swept[name].reshape(-1).view(torch.uint8)), name


def test_what_does_not_change_keeps_its_codes(tmp_path: Path) -> None:
    """Under an adapter for one of two modules, in any scheme; the other is refused where values are not encoded."""
    rng = np.random.default_rng(3)
    stored = of_module(gptq(rng, 32, 64)[0], "layers.0.a.weight") | of_module(
        bnb4(rng, (32, 64))[0], "layers.0.b.weight"
    )
    fp8 = of_module({"": floats8(rng, (32, 64)), "!weight_scale": torch.tensor(0.01)}, "layers.0.c.weight")
    base = write(tmp_path / "base", stored | fp8, quantisation())
    up, down = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((32, 2), (2, 64)))
    for target, code in {"c": 0, "a": 4}.items():
        folder = tmp_path / f"adapter {target}"
        folder.mkdir()
        module = f"base_model.model.layers.0.{target}"
        save_file(
            {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        recipe = {
            "models": {"m": {"model": str(base), "adapter": str(folder)}},
            "merge": {"method": "passthrough", "sources": ["m"]},
            "output": {"quantize": "keep", "path": str(tmp_path / f"out {target}")},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert main(["run", str(tmp_path / "recipe.yaml"), "--quiet"]) == code
    out = load_file(tmp_path / "out c" / "model.safetensors")
    assert all(torch.equal(out[name], each) for name, each in stored.items())
    assert out.keys() == {*stored, *fp8} and not (tmp_path / "out a").exists()
    exact = fp8["layers.0.c.weight"].double() * 0.01 + 2 * (up.double() @ down.double())
    found = out["layers.0.c.weight"].double() * out["layers.0.c.weight_scale"].double()
    once = rounded(exact, (32, 64), F8, F32)
    assert 0 < (found - exact).norm() <= 1.001 * (once - exact).norm()


def test_nothing_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {"w": torch.ones(2, 2)})
    words = ["linear", "--sources", str(a), "-o", str(tmp_path / "out"), "--quantize"]
    assert main([*words, "keep"]) == 4 and "not quantised" in capsys.readouterr().err
    assert main([*words, "fp8"]) == 2 and "must be keep" in capsys.readouterr().err


def test_experts_in_mxfp4_load_in_transformers_as_they_are_decoded_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.GptOssConfig(
        **wide, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, head_dim=32, vocab_size=8
    )
    folders = []
    for seed in range(2):
        stored: dict[str, torch.Tensor] = {}
        torch.manual_seed(seed)
        for name, value in transformers.GptOssForCausalLM(config).bfloat16().state_dict().items():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inside, out = value.shape
                parts, _ = mxfp4(np.random.default_rng(seed), experts, out, inside)
                stored |= of_module(parts, name)
            else:
                stored[name] = value
        quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
        written = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": quantised}
        folders.append(write(tmp_path / f"m{seed}", stored, written))
    run("linear", "--sources", *folders, "--quantize", "keep", "-o", tmp_path / "out")
    loaded, report = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(report.values())
    state = loaded.state_dict()
    for name, value in plain(tmp_path / "out").items():
        assert torch.equal(state[name].double(), value), name
