"""Quantised tensors are recognised in lone files and folders and merged as the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import W, check, merged, of_module
from pipelines import write_pipeline
from quantise import bnb4, floats8, gptq, mxfp4, nvfp4
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main
from mergekit_px.errors import InputError, PlanError
from mergekit_px.merging import plan_recipe
from mergekit_px.plan.model import Plan
from mergekit_px.testing import write_checkpoint


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
        merged(tmp_path, {W: codes, "norm": torch.ones(8), W + "_scale": torch.tensor(scale)})
    assert not (tmp_path / "out").exists()


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
        ({"a.W_q": torch.ones(4, 8).byte(), "a.scale": torch.ones(8, 1), "a.nbits": torch.tensor(4)}, "of HQQ"),
        ({"a.weight._data": torch.ones(4, 8).char(), "a.weight._scale": torch.ones(4, 1)}, "of quanto"),
        ({"a._weight_qdata": torch.ones(4, 8).to(torch.float8_e4m3fn), "a._weight_scale": torch.ones(4)}, "of torchao"),
        ({"a.codes": torch.ones(4, 8, 1).short(), "a.codebooks": torch.ones(1, 4, 1, 8)}, "of AQLM"),
        ({"a.bitmask": torch.ones(4, 1).byte(), "a.compressed": torch.ones(8)}, "sparse storage"),
        ({"a.up_proj_blocks": torch.ones(2, 4, 1, 16).byte()}, "packed codes"),
        (
            {
                "a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
                "a.weight_scale": torch.ones(4, 1),
                "b.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
            },
            "b.weight of 'a': fp8 codes without scales",
        ),
        ({"a.stuff": torch.ones(4, 8).int(), "a.amounts": torch.ones(4)}, "go with a.amounts"),
        (
            {
                "a.weight": torch.ones(4, 64).to(torch.float8_e4m3fn),
                "a.weight_scale": torch.ones(4, 2).byte(),
                "a.comfy_quant": torch.ones(20).byte(),
            },
            "order of tiles",
        ),
    ],
)
def test_what_is_not_decoded_is_refused_by_name(tmp_path: Path, stored: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(PlanError, match=what):
        merged(tmp_path, stored)


def test_tables_beside_numbers_are_no_codes(tmp_path: Path) -> None:
    stored = {
        "a.relative_position_index": torch.arange(4).int().reshape(2, 2),
        "a.relative_position_bias_table": torch.ones(3, 2),
        "b.weight": torch.ones(3, 2),
        "b.places": torch.ones(3, 2).int(),
        "q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "q.weight_scale": torch.full((4, 1), 2.0),
        "q.comfy_quant": torch.ones(20).byte(),
        "q.k_scale": torch.ones(()),
    }
    out = merged(tmp_path, stored)
    assert out.keys() == {*stored} - {"q.weight_scale", "q.comfy_quant", "q.k_scale"}


def test_powers_of_two_in_plain_bytes(tmp_path: Path) -> None:
    codes = floats8(np.random.default_rng(15), (8, 64))
    out = merged(tmp_path, {W: codes, f"{W}_scale": torch.full((8, 2), 126, dtype=torch.uint8)})
    check(out[W], codes.float().numpy() / 2)


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


@pytest.mark.parametrize("grid", [(), (8, 1), (8, 2)])
def test_int8_from_zero_points_on(tmp_path: Path, grid: tuple[int, ...]) -> None:
    rng = np.random.default_rng(13)
    codes, zeros = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((8, 256), grid))
    scales = rng.uniform(0.01, 0.1, grid).astype(np.float32)
    stored = {W: codes, f"{W}_scale": scales, f"{W}_zero_point": zeros}
    out = merged(tmp_path, {name: torch.from_numpy(np.array(each)) for name, each in stored.items()})
    by_row = (np.repeat(each, 128, 1) if grid == (8, 2) else each for each in (zeros.astype(np.float32), scales))
    zero, scale = by_row
    check(out[W], (codes.astype(np.float32) - zero) * scale)


def test_zero_points_that_do_not_fit(tmp_path: Path) -> None:
    codes = torch.ones(8, 8, dtype=torch.int8)
    with pytest.raises(InputError, match="do not fit the codes"):
        merged(tmp_path, {W: codes, f"{W}_scale": torch.ones(8, 1), f"{W}_zero_point": torch.ones(4, 1).char()})


def test_a_component_has_settings_and_a_config_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    folder = write_pipeline(tmp_path / "pipeline", 1)
    stored, values = gptq(rng, 32, 64, version=2)
    save_file(of_module(stored), folder / "text_encoder" / "model.safetensors")
    settings = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (folder / "text_encoder" / "quantize_config.json").write_text(json.dumps(settings))
    words = ["linear", "--sources", str(folder), "--quiet", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    found = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")[W]
    assert found.dtype == torch.float32  # as the component's config says, and not the pipeline's
    check(found, values)
    assert not (tmp_path / "out" / "text_encoder" / "quantize_config.json").exists()


def test_floats_of_8_bits_without_scales_are_told_and_not_merged_with_scaled_ones(tmp_path: Path) -> None:
    codes = torch.ones(4, 8).to(torch.float8_e4m3fn)
    for name, stored in {"plain": {W: codes}, "scaled": {W: codes, W + "_scale": torch.ones(1)}}.items():
        write_checkpoint(tmp_path / name, stored)

    def plan(*names: str) -> Plan:
        models = {name: str(tmp_path / name) for name in names}
        step = {"method": "linear", "sources": list(names)}
        return plan_recipe({"pxmerge": 1, "models": models, "merge": step, "output": {"path": str(tmp_path / "out")}})

    assert any("1 tensors of 'plain' are 8-bit floats without scales" in note for note in plan("plain").notes)
    with pytest.raises(PlanError, match="without scales in 'plain' and with scales in 'scaled'"):
        plan("plain", "scaled")
