"""Quantised tensors are recognised in lone files and folders and merged as the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import W, check, merged
from quantise import bnb4, floats8, mxfp4, nvfp4

from mergekit_px.errors import InputError, PlanError


@pytest.mark.parametrize(
    ("leaf", "scales", "side"),
    [
        ("weight_scale", (), None),
        ("weight_scale", (200, 1), None),
        ("weight_scale", (200,), None),
        ("weight_scale_inv", (2, 3), 128),
        ("scale_weight", (1,), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_scales(
    tmp_path: Path, leaf: str, scales: tuple[int, ...], side: int | None, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(1)
    codes = floats8(rng, (200, 320), dtype)
    scale = rng.uniform(0.5, 2, scales).astype(np.float32)
    module = W.removesuffix("weight")
    stored = {W: codes, module + leaf: torch.from_numpy(np.array(scale)), module + "input_scale": torch.ones(1)}
    stored["model.norm.weight"] = torch.ones(320)
    out = merged(tmp_path, stored)
    assert set(out) == {W, "model.norm.weight"}
    grid = scale.reshape(-1, 1) if scale.ndim == 1 else scale
    if side is not None:
        grid = np.repeat(np.repeat(scale, side, 0), side, 1)[:200, :320]
    check(out[W], codes.float().numpy() * grid)


def test_comfy_marker_is_left_behind(tmp_path: Path) -> None:
    codes = floats8(np.random.default_rng(2), (8, 8))
    out = merged(
        tmp_path,
        {"a.q.weight": codes, "a.q.scale_weight": torch.tensor([0.5]), "scaled_fp8": torch.zeros(2).to(codes.dtype)},
    )
    assert set(out) == {"a.q.weight"}
    check(out["a.q.weight"], codes.float().numpy() * 0.5)


def test_int8_rows_of_bitsandbytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (6, 10)).astype(np.int8)
    largest = rng.uniform(0.1, 3, 6).astype(np.float32)
    module = W.removesuffix("weight")
    stored = {W: torch.from_numpy(codes), module + "SCB": torch.from_numpy(largest)}
    check(merged(tmp_path, stored)[W], codes * (largest / np.float32(127))[:, None])


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_four_bit(tmp_path: Path, nested: bool) -> None:
    stored, values = bnb4(np.random.default_rng(4), (130, 300), nested=nested)
    out = merged(tmp_path, {W + end: tensor for end, tensor in stored.items()})
    assert set(out) == {W}
    np.testing.assert_allclose(out[W].numpy(), values, rtol=1e-6, atol=1e-7)


def test_mxfp4_experts(tmp_path: Path) -> None:
    stored, values = mxfp4(np.random.default_rng(5), 3, 20, 64)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    out = merged(tmp_path, {name + end: tensor for end, tensor in stored.items()})
    check(out[name], values)


@pytest.mark.parametrize("writer", ["compressed-tensors", "modelopt"])
def test_nvfp4(tmp_path: Path, writer: str) -> None:
    codes, scales, whole, values = nvfp4(np.random.default_rng(6), 24, 48)
    if writer == "modelopt":
        stored = {W: codes, W + "_scale": scales, W + "_scale_2": torch.tensor(whole)}
    else:
        stored = {W + "_packed": codes, W + "_scale": scales, W + "_global_scale": torch.tensor([1 / whole])}
    check(merged(tmp_path, stored)[W], values)


def test_a_large_tensor_is_decoded_in_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    codes = floats8(rng, (3000, 1100))
    scale = rng.uniform(0.5, 2, (24, 9)).astype(np.float32)
    out = merged(tmp_path, {W: codes, W + "_scale_inv": torch.from_numpy(scale)})
    grid = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:3000, :1100]
    check(out[W], codes.float().numpy() * grid)


def test_the_config_loses_its_quantisation_and_names_the_dtype(tmp_path: Path) -> None:
    codes = floats8(np.random.default_rng(8), (8, 8))
    config = {
        "model_type": "llama",
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"quantization_config": {"quant_method": "fp8"}},
    }
    merged(tmp_path, {W: codes, W + "_scale": torch.tensor(0.5)}, config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and "quantization_config" not in written["text_config"]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(tmp_path: Path, scale: float) -> None:
    codes = floats8(np.random.default_rng(9), (8, 8))
    with pytest.raises(InputError, match="must be positive and finite"):
        merged(tmp_path, {W: codes, W + "_scale": torch.tensor(scale)})


@pytest.mark.parametrize("shape", [(3,), (8, 3), (2, 2, 2), (0,)])
def test_scales_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = floats8(np.random.default_rng(10), (8, 8))
    with pytest.raises(InputError, match="do not fit the codes"):
        merged(tmp_path, {W: codes, W + "_scale": torch.ones(shape)})


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        ({"a.qweight": torch.ones(4, 8).int(), "a.scales": torch.ones(4)}, "GPTQ or AWQ without"),
        ({"a.weight": torch.ones(4, 8).byte()}, "packed codes"),
        ({"a.weight": torch.ones(4, 8).byte(), "a.weight.absmax": torch.ones(1)}, "quant_state"),
        ({"a.weight_packed": torch.ones(4, 8).int(), "a.weight_scale": torch.ones(4, 1)}, "compressed-tensors"),
        ({"a.weight": torch.ones(4, 8), "a.weight_scale": torch.ones(4, 1)}, "scales of quantised weights"),
    ],
)
def test_what_is_not_decoded_is_refused_by_name(tmp_path: Path, stored: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(PlanError, match=what):
        merged(tmp_path, stored)


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a": ' * 5000, "no", "[1]", '{"shape": [4, 32]}', b"\xff".decode("latin-1")]
)
def test_settings_of_bitsandbytes_that_are_none(tmp_path: Path, text: str) -> None:
    stored, _ = bnb4(np.random.default_rng(12), (4, 32))
    stored[".quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text.encode("latin-1")), dtype=torch.uint8)
    with pytest.raises(InputError, match="no settings of bitsandbytes"):
        merged(tmp_path, {W + name: tensor for name, tensor in stored.items()})


def test_two_quantisations_in_one_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    codes = floats8(rng, (8, 8))
    four, values = bnb4(rng, (4, 32))
    out = merged(tmp_path, {W: codes, W + "_scale": torch.tensor(2.0), **{"b.weight" + k: v for k, v in four.items()}})
    check(out[W], codes.float().numpy() * 2)
    np.testing.assert_allclose(out["b.weight"].numpy(), values, rtol=1e-6, atol=1e-7)
