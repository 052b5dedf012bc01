"""GPTQ, AWQ and packed compressed-tensors merge as the values that they stand for, or are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import W, check, merged, of_module
from quantise import awq, compressed_integers, gptq, quantisation, words
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main
from mergekit_px.errors import InputError, PlanError

V2 = {"checkpoint_format": "gptq_v2"}


def compressed_config(bits: int = 4, group: int = 32, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(tmp_path: Path, bits: int, version: int, ordered: bool) -> None:
    stored, values = gptq(np.random.default_rng(bits), 96, 192, bits, version=version, ordered=ordered)
    config = quantisation(bits, desc_act=ordered, **(V2 if version == 2 else {}))
    out = merged(tmp_path, of_module(stored) | {"model.norm.weight": torch.ones(4)}, config)
    assert set(out) == {W, "model.norm.weight"}
    check(out[W], values)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_without_a_config_tells_its_version_by_the_middle(tmp_path: Path, version: int) -> None:
    stored, values = gptq(np.random.default_rng(1), 32, 64, version=version, symmetric=True)
    check(merged(tmp_path, of_module(stored))[W], values)


def test_gptq_without_a_config_and_without_a_middle_is_asked_for(tmp_path: Path) -> None:
    stored, _ = gptq(np.random.default_rng(2), 32, 64)
    with pytest.raises(InputError, match="nothing says which"):
        merged(tmp_path, of_module(stored))


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_settings_in_a_file_of_their_own(tmp_path: Path, key: str) -> None:
    stored, values = gptq(np.random.default_rng(3), 32, 64, version=2)
    settings = {"bits": 4, "group_size": 32, key: "gptq_v2"}
    check(merged(tmp_path, of_module(stored), {"model_type": "llama"}, quantize_config=settings)[W], values)
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_groups_cut_short_and_one_for_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    short, short_values = gptq(rng, 32, 320, group=128)
    del short["!g_idx"]
    check(merged(tmp_path, of_module(short), quantisation(group=128))[W], short_values)
    whole, whole_values = gptq(rng, 32, 320, group=320)
    (tmp_path / "second").mkdir()
    check(merged(tmp_path / "second", of_module(whole), quantisation(group=-1))[W], whole_values)


@pytest.mark.parametrize(
    "config", [None, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}]
)
def test_awq(tmp_path: Path, config: Any) -> None:
    stored, values = awq(np.random.default_rng(5), 104, 192)
    check(merged(tmp_path, of_module(stored), config)[W], values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_compressed_integers(tmp_path: Path, bits: int, symmetric: bool, configured: bool) -> None:
    stored, values = compressed_integers(np.random.default_rng(6), 72, 192, bits, symmetric=symmetric)
    config = compressed_config(bits, symmetric=symmetric) if configured else None
    check(merged(tmp_path, of_module(stored), config)[W], values)


def test_compressed_integers_in_the_order_of_activations_and_padded(tmp_path: Path) -> None:
    stored, values = compressed_integers(np.random.default_rng(7), 24, 90, group=30, ordered=True)
    check(merged(tmp_path, of_module(stored))[W], values)


def test_one_scale_for_each_output(tmp_path: Path) -> None:
    stored, values = compressed_integers(np.random.default_rng(8), 24, 90, 8, group=90)
    check(merged(tmp_path, of_module(stored))[W], values)


@pytest.mark.parametrize("make", [gptq, awq, compressed_integers])
def test_large_tensors_are_decoded_in_pieces(tmp_path: Path, make: Any) -> None:
    """Wide enough that a few columns are read alone, and of so many elements that there are several pieces."""
    stored, values = make(np.random.default_rng(9), 16384, 256, group=64)
    config = quantisation(group=64) if make is gptq else None
    check(merged(tmp_path, of_module(stored), config)[W], values)


def test_scales_may_be_negative(tmp_path: Path) -> None:
    stored, values = gptq(np.random.default_rng(10), 32, 64)
    stored["!scales"] = -stored["!scales"]
    check(merged(tmp_path, of_module(stored), quantisation())[W], -values)


@pytest.mark.parametrize("make", [gptq, awq, compressed_integers])
def test_an_adapter_on_a_quantised_base(tmp_path: Path, make: Any) -> None:
    rng = np.random.default_rng(11)
    stored, values = make(rng, 32, 64)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(of_module(stored), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(quantisation() if make is gptq else {}))
    up, down = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((32, 2), (2, 64)))
    module = f"base_model.model.{W.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    recipe = {
        "models": {"a": {"model": str(base), "adapter": str(adapter)}},
        "merge": {"method": "linear", "sources": ["a"]},
        "output": {"dtype": "float32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    out = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(out[W].numpy(), values + 2 * (up @ down).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [gptq, awq, compressed_integers])
def test_scales_must_be_finite_and_not_zero(tmp_path: Path, make: Any, scale: float) -> None:
    stored, _ = make(np.random.default_rng(12), 32, 64)
    name = next(name for name in stored if "scale" in name)
    stored[name][1, 1] = scale
    with pytest.raises(InputError, match="must be finite and not zero"):
        merged(tmp_path, of_module(stored), quantisation() if make is gptq else None)


@pytest.mark.parametrize(("make", "leaf"), [(gptq, "!g_idx"), (compressed_integers, "!weight_g_idx")])
@pytest.mark.parametrize("group", [2, -2])
def test_groups_outside_the_scales(tmp_path: Path, make: Any, leaf: str, group: int) -> None:
    stored, _ = make(np.random.default_rng(13), 32, 64, ordered=True)
    stored[leaf][5] = group
    with pytest.raises(InputError, match=f"names group {group}, and there are 2"):
        merged(tmp_path, of_module(stored), quantisation() if make is gptq else None)


@pytest.mark.parametrize(
    ("make", "leaf"),
    [(gptq, "qzeros"), (gptq, "scales"), (awq, "qzeros"), (awq, "scales"), (gptq, "g_idx"),
     (compressed_integers, "weight_scale"), (compressed_integers, "weight_shape")],
)  # fmt: skip
def test_missing_parts(tmp_path: Path, make: Any, leaf: str) -> None:
    stored, _ = make(np.random.default_rng(14), 32, 64)
    del stored[f"!{leaf}"]
    with pytest.raises(PlanError, match="without"):
        merged(tmp_path, of_module(stored), quantisation(desc_act=True) if make is gptq else None)


def test_missing_zero_points_of_integers_that_are_not_symmetric(tmp_path: Path) -> None:
    stored, _ = compressed_integers(np.random.default_rng(15), 32, 64, symmetric=False)
    del stored["!weight_zero_point"]
    with pytest.raises(PlanError, match="without their zero points"):
        merged(tmp_path, of_module(stored), compressed_config(symmetric=False))


@pytest.mark.parametrize("make", [gptq, awq, compressed_integers])
def test_parts_of_other_shapes(tmp_path: Path, make: Any) -> None:
    whole, _ = make(np.random.default_rng(16), 32, 64)
    for number, leaf in enumerate(whole):
        part = whole[leaf]
        other = part.int() if part.is_floating_point() else part.double()
        for cut in (part[:-1], part[:, None, None] if part.ndim > 1 else part[:0], other):
            place = tmp_path / f"{number}-{cut.ndim}-{len(cut)}-{cut.dtype}"
            place.mkdir()
            with pytest.raises(InputError, match=r"do not fit together|is no shape|say 4 bits in|of several sizes"):
                merged(place, of_module(whole | {leaf: cut.contiguous()}), quantisation() if make is gptq else None)
            assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (gptq, quantisation(8)),
        (gptq, quantisation(4, 64)),
        (gptq, quantisation(4, -1)),
        (awq, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}),
        (compressed_integers, compressed_config(8)),
        (compressed_integers, compressed_config(4, 16)),
    ],
)
def test_settings_against_the_shapes(tmp_path: Path, make: Any, config: Any) -> None:
    stored, _ = make(np.random.default_rng(17), 32, 64)
    with pytest.raises(InputError, match="say 4 bits in 2 groups of 64 inputs"):
        merged(tmp_path, of_module(stored), config)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (gptq, {"quant_method": "gptq", "checkpoint_format": "marlin"}),
        (gptq, {"quant_method": "gptq", "is_marlin_format": True}),
        (awq, {"quant_method": "awq", "version": "gemv"}),
        (gptq, {"quant_method": "auto-round", "packing_format": "auto_round:other"}),
        (gptq, {"quant_method": "another", "bits": 4}),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, make: Any, settings: Any) -> None:
    stored, _ = make(np.random.default_rng(18), 32, 64)
    with pytest.raises(PlanError, match=r"layout (marlin|gemv|auto_round:other|of another)"):
        merged(tmp_path, of_module(stored), {"quantization_config": settings})


@pytest.mark.parametrize("junk", ["four", -3, True, None, [4], {}])
def test_settings_that_are_no_numbers_leave_it_to_the_shapes(tmp_path: Path, junk: Any) -> None:
    stored, values = gptq(np.random.default_rng(19), 32, 64)
    config = quantisation() | {"text_config": {}}
    config["quantization_config"] |= {"bits": junk, "group_size": junk, "dynamic": None}
    check(merged(tmp_path, of_module(stored), config)[W], values)


def test_a_weight_that_is_plain_and_encoded(tmp_path: Path) -> None:
    stored, _ = awq(np.random.default_rng(20), 32, 64)
    with pytest.raises(InputError, match="is there plainly and encoded"):
        merged(tmp_path, of_module(stored) | {W: torch.ones(32, 64)})


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_words_hold_codes_from_the_lowest_bit(bits: int) -> None:
    """The tests' own packing, against numbers of any length."""
    codes = np.random.default_rng(21).integers(0, 1 << bits, 64)
    number = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    packed = words(codes, bits).numpy().view(np.uint32)
    assert [int(word) for word in packed] == [number >> (32 * place) & 0xFFFFFFFF for place in range(len(packed))]
