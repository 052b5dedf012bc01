"""Files without a configuration: the names of every style, and the formulas of LyCORIS in float64 numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import AdapterError

UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 6),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (6, 6),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (6,),
    "down_blocks.0.resnets.0.conv1.weight": (8, 6, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (6,),
    "down_blocks.0.resnets.0.norm1.bias": (6,),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 6, 1, 1),
}
TO_Q, TO_OUT, OUT_BIAS, CONV, NORM, NORM_BIAS, PROJ = UNET
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6)}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape)).float()


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata or None)
    return path


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return write(tmp_path / "unet.safetensors", {name: numbers(*shape, seed=9) for name, shape in UNET.items()})


def apply(adapter: Path, base: Path, component: str | None = None) -> dict[str, np.ndarray]:
    """The tensors that change, in float64; rows in two pieces where they may be cut."""
    tensors, stored = load_file(base), load_file(adapter)
    result = {}
    for target, patch in open_adapter(adapter).bind(open_checkpoint(base), BindOptions(component=component)).items():
        factors = {role: stored[tensor.name] for role, tensor in patch.factors.items()}
        source = None if patch.source is None else tensors[patch.source].double()
        merged = patch.merged(source, factors)
        if patch.access == "rows":
            cut = patch.out_shape[0] // 2 + 1
            pieces = [
                patch.merged(None if source is None else source[rows], factors, rows)
                for rows in (slice(0, cut), slice(cut, patch.out_shape[0]))
            ]
            torch.testing.assert_close(torch.cat(pieces), merged, atol=1e-12, rtol=1e-12)
        result[target] = merged.double().numpy()
    return result


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def flat(name: str, prefix: str = "lora_unet_") -> str:
    return prefix + name.removesuffix(".weight").replace(".", "_")


def dotted(name: str) -> str:
    return name.removesuffix(".weight")


DOWN, UP = numbers(2, 6), numbers(8, 2)

STYLES = {
    "kohya": (f"{flat(TO_Q)}.lora_down.weight", f"{flat(TO_Q)}.lora_up.weight"),
    "lycoris": (f"{flat(TO_Q, 'lycoris_')}.lora_down.weight", f"{flat(TO_Q, 'lycoris_')}.lora_up.weight"),
    "diffusers": (f"unet.{dotted(TO_Q)}.lora_A.weight", f"unet.{dotted(TO_Q)}.lora_B.weight"),
    "diffusers with the adapter's name": (
        f"unet.{dotted(TO_Q)}.lora_A.default_0.weight",
        f"unet.{dotted(TO_Q)}.lora_B.default_0.weight",
    ),
    "diffusers 0.20": (f"unet.{dotted(TO_Q)}.lora.down.weight", f"unet.{dotted(TO_Q)}.lora.up.weight"),
    "diffusers 0.19": (
        f"unet.{dotted(TO_Q)}.lora_linear_layer.down.weight",
        f"unet.{dotted(TO_Q)}.lora_linear_layer.up.weight",
    ),
    "diffusers attention processors": (
        f"unet.{dotted(TO_Q).removesuffix('.to_q')}.processor.to_q_lora.down.weight",
        f"unet.{dotted(TO_Q).removesuffix('.to_q')}.processor.to_q_lora.up.weight",
    ),
    "comfy": (f"diffusion_model.{dotted(TO_Q)}.lora_A.weight", f"diffusion_model.{dotted(TO_Q)}.lora_B.weight"),
    "bare names": (f"{dotted(TO_Q)}.lora_A.weight", f"{dotted(TO_Q)}.lora_B.weight"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names(style: str, unet: Path, tmp_path: Path) -> None:
    down, up = STYLES[style]
    got = apply(write(tmp_path / "lora.safetensors", {down: DOWN, up: UP}), unet)

    expected = array(load_file(unet)[TO_Q]) + array(UP) @ array(DOWN)
    assert list(got) == [TO_Q]
    np.testing.assert_allclose(got[TO_Q], expected, atol=1e-12)


@pytest.mark.parametrize(("alpha", "scale"), [(5.0, 2.5), (0.0, 1.0)])
def test_alpha_over_rank_and_a_zero_alpha_is_none(alpha: float, scale: float, unet: Path, tmp_path: Path) -> None:
    down, up = STYLES["kohya"]
    tensors = {down: DOWN, up: UP, f"{flat(TO_Q)}.alpha": torch.tensor(alpha)}
    got = apply(write(tmp_path / "lora.safetensors", tensors), unet)

    expected = array(load_file(unet)[TO_Q]) + scale * array(UP) @ array(DOWN)
    np.testing.assert_allclose(got[TO_Q], expected, atol=1e-12)


def test_diffusers_metadata_gives_the_scale(unet: Path, tmp_path: Path) -> None:
    down, up = STYLES["diffusers"]
    metadata = json.dumps({"unet.r": 4, "unet.lora_alpha": 6, "unet.rank_pattern": {"attn1.to_q": 2}})
    got = apply(write(tmp_path / "a.safetensors", {down: DOWN, up: UP}, lora_adapter_metadata=metadata), unet)

    expected = array(load_file(unet)[TO_Q]) + 3 * array(UP) @ array(DOWN)
    np.testing.assert_allclose(got[TO_Q], expected, atol=1e-12)


def test_output_projection_of_the_first_diffusers_style(unet: Path, tmp_path: Path) -> None:
    place = f"unet.{dotted(TO_OUT).removesuffix('.to_out.0')}.processor.to_out_lora"
    got = apply(
        write(tmp_path / "a.safetensors", {f"{place}.down.weight": DOWN, f"{place}.up.weight": numbers(6, 2)}), unet
    )
    assert list(got) == [TO_OUT]


def test_first_diffusers_style_of_text_encoders(tmp_path: Path) -> None:
    base = write(tmp_path / "text.safetensors", {name: numbers(*shape) for name, shape in TEXT.items()})
    place = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    adapter = write(tmp_path / "a.safetensors", {f"{place}.down.weight": DOWN, f"{place}.up.weight": numbers(6, 2)})
    assert list(apply(adapter, base)) == list(TEXT)


def test_convolutions_plain_tucker_and_stored_as_linear(unet: Path, tmp_path: Path) -> None:
    down, mid, up = numbers(2, 6, 1, 1), numbers(2, 2, 3, 3), numbers(8, 2, 1, 1)
    plain = numbers(2, 6, 3, 3)
    base = load_file(unet)

    tensors = {f"{flat(CONV)}.lora_down.weight": plain, f"{flat(CONV)}.lora_up.weight": up}
    got = apply(write(tmp_path / "plain.safetensors", tensors), unet)[CONV]
    expected = np.einsum("om,mikl->oikl", array(up)[..., 0, 0], array(plain))
    np.testing.assert_allclose(got - array(base[CONV]), expected, atol=1e-12)

    tensors = {f"{flat(CONV)}.lora_{name}.weight": part for name, part in {"down": down, "mid": mid, "up": up}.items()}
    got = apply(write(tmp_path / "tucker.safetensors", tensors), unet)[CONV]
    expected = np.einsum("om,mnkl,ni->oikl", array(up)[..., 0, 0], array(mid), array(down)[..., 0, 0])
    np.testing.assert_allclose(got - array(base[CONV]), expected, atol=1e-12)

    tensors = {f"{flat(PROJ)}.lora_down.weight": DOWN, f"{flat(PROJ)}.lora_up.weight": UP}
    got = apply(write(tmp_path / "linear.safetensors", tensors), unet)[PROJ]
    np.testing.assert_allclose((got - array(base[PROJ]))[..., 0, 0], array(UP) @ array(DOWN), atol=1e-12)


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("name", [TO_Q, CONV])
def test_magnitudes_by_output_and_by_input(name: str, by_input: bool, unet: Path, tmp_path: Path) -> None:
    shape = UNET[name]
    down = numbers(2, *shape[1:])
    up = UP.reshape(8, 2, *[1] * (len(shape) - 2))
    size = (1, shape[1]) if by_input else (shape[0], 1)
    magnitude = numbers(*size, *[1] * (len(shape) - 2)).abs() + 1
    tensors = {
        f"{flat(name)}.lora_down.weight": down,
        f"{flat(name)}.lora_up.weight": up,
        f"{flat(name)}.dora_scale": magnitude,
    }
    got = apply(write(tmp_path / "a.safetensors", tensors), unet)[name]

    weight = array(load_file(unet)[name]) + (array(UP) @ array(down).reshape(2, -1)).reshape(shape)
    axes = tuple(axis for axis in range(len(shape)) if axis != int(by_input))
    expected = weight * array(magnitude) / np.sqrt((weight**2).sum(axis=axes, keepdims=True))
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_loha_scaled_by_alpha_over_rank(unet: Path, tmp_path: Path) -> None:
    parts = {"w1_a": numbers(8, 2), "w1_b": numbers(2, 6), "w2_a": numbers(8, 2, seed=1), "w2_b": numbers(2, 6, seed=1)}
    tensors = {f"{flat(TO_Q)}.hada_{name}": part for name, part in parts.items()}
    tensors[f"{flat(TO_Q)}.alpha"] = torch.tensor(3.0)
    got = apply(write(tmp_path / "a.safetensors", tensors), unet)[TO_Q]

    a1, b1, a2, b2 = map(array, parts.values())
    np.testing.assert_allclose(got - array(load_file(unet)[TO_Q]), 1.5 * (a1 @ b1) * (a2 @ b2), atol=1e-12)


def test_lokr_is_scaled_only_where_a_factor_is_split(unet: Path, tmp_path: Path) -> None:
    first, second, left, right = numbers(2, 3), numbers(4, 2), numbers(4, 1), numbers(1, 2)
    base = array(load_file(unet)[TO_Q])
    alpha = {f"{flat(TO_Q)}.alpha": torch.tensor(3.0)}

    whole = alpha | {f"{flat(TO_Q)}.lokr_w1": first, f"{flat(TO_Q)}.lokr_w2": second}
    got = apply(write(tmp_path / "whole.safetensors", whole), unet)[TO_Q]
    np.testing.assert_allclose(got - base, np.kron(array(first), array(second)), atol=1e-12)

    names = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    split = alpha | {f"{flat(TO_Q)}.{name}": part for name, part in zip(names, (first, left, right), strict=True)}
    got = apply(write(tmp_path / "split.safetensors", split), unet)[TO_Q]
    np.testing.assert_allclose(got - base, 3 * np.kron(array(first), array(left) @ array(right)), atol=1e-12)


def test_lokr_of_a_one_dimensional_convolution_keeps_its_kernel_apart(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"conv.weight": numbers(8, 6, 3)})
    first, second = numbers(2, 3), numbers(4, 2, 3)
    adapter = write(tmp_path / "a.safetensors", {"lycoris_conv.lokr_w1": first, "lycoris_conv.lokr_w2": second})
    got = apply(adapter, base)["conv.weight"]
    expected = np.einsum("ac,bdk->abcdk", array(first), array(second)).reshape(8, 6, 3)
    np.testing.assert_allclose(got - array(load_file(base)["conv.weight"]), expected, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_diagonal_oft_rotates_outputs(alpha: float, unet: Path, tmp_path: Path) -> None:
    blocks, rescale = numbers(4, 2, 2) * 0.3, numbers(8, 1, 1, 1).abs() + 1
    tensors = {
        f"{flat(CONV)}.oft_blocks": blocks,
        f"{flat(CONV)}.rescale": rescale,
        f"{flat(CONV)}.alpha": torch.tensor(alpha),
    }
    got = apply(write(tmp_path / "a.safetensors", tensors), unet)[CONV]

    skew = array(blocks) - array(blocks).transpose(0, 2, 1)
    if alpha:
        skew *= np.float32(alpha) * 8 / np.sqrt((skew**2).sum())
    rotation = np.zeros((8, 8))
    for number, q in enumerate(skew):
        place = slice(2 * number, 2 * number + 2)
        rotation[place, place] = (np.eye(2) + q) @ np.linalg.inv(np.eye(2) - q)
    expected = (rotation.T @ array(load_file(unet)[CONV]).reshape(8, -1)).reshape(UNET[CONV]) * array(rescale)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_differences_norms_and_biases_are_added_unscaled(unet: Path, tmp_path: Path) -> None:
    parts = {
        f"{flat(TO_OUT)}.diff": numbers(6, 6),
        f"{flat(TO_OUT)}.diff_b": numbers(6),
        f"{flat(NORM)}.w_norm": numbers(6, seed=1),
        f"{flat(NORM)}.b_norm": numbers(6, seed=2),
    }
    got = apply(write(tmp_path / "a.safetensors", parts), unet)
    base = load_file(unet)
    for target, delta in zip((TO_OUT, OUT_BIAS, NORM, NORM_BIAS), parts.values(), strict=True):
        np.testing.assert_allclose(got[target] - array(base[target]), array(delta), atol=1e-12)


def test_a_bias_of_the_up_factor_is_scaled_with_it(unet: Path, tmp_path: Path) -> None:
    place = f"unet.{dotted(TO_OUT)}"
    parts = {
        f"{place}.lora_A.weight": DOWN,
        f"{place}.lora_B.weight": numbers(6, 2),
        f"{place}.lora_B.bias": numbers(6),
        f"{place}.alpha": torch.tensor(4.0),
    }
    got = apply(write(tmp_path / "a.safetensors", parts), unet)
    expected = array(load_file(unet)[OUT_BIAS]) + 2 * array(numbers(6))
    np.testing.assert_allclose(got[OUT_BIAS], expected, atol=1e-12)


def test_one_component_of_a_file_for_several(unet: Path, tmp_path: Path) -> None:
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    down, up = STYLES["kohya"]
    parts = {down: DOWN, up: UP, f"{text}.lora_down.weight": DOWN, f"{text}.lora_up.weight": numbers(6, 2)}
    adapter = open_adapter(write(tmp_path / "a.safetensors", parts))
    base = open_checkpoint(unet)

    binding = adapter.bind(base, BindOptions(component="unet"))
    assert list(binding) == [TO_Q]
    assert binding.left_out == (f"{text}.lora_down.weight", f"{text}.lora_up.weight")
    with pytest.raises(AdapterError, match="nothing in the base fits text_model_encoder_layers_0_self_attn_q_proj"):
        adapter.bind(base)
    with pytest.raises(AdapterError, match="nothing for the component text_encoder_2"):
        adapter.bind(base, BindOptions(component="text_encoder_2"))


def test_flat_names_are_looked_up_not_split(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"a_b.c.weight": numbers(8, 6), "model.x.mid_block.to_q.weight": UP})
    adapter = write(
        tmp_path / "a.safetensors", {"lora_unet_a_b_c.lora_down.weight": DOWN, "lora_unet_a_b_c.lora_up.weight": UP}
    )
    assert list(apply(adapter, base)) == ["a_b.c.weight"]

    both = write(tmp_path / "both.safetensors", {"a_b.c.weight": numbers(8, 6), "a.b_c.weight": numbers(8, 6)})
    with pytest.raises(AdapterError, match=r"a_b_c could be any of a\.b_c, a_b\.c"):
        open_adapter(adapter).bind(open_checkpoint(both))


def test_flat_names_find_a_model_inside_a_whole_pipeline(unet: Path, tmp_path: Path) -> None:
    inside = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(unet).items()}
    whole = write(tmp_path / "whole.safetensors", inside)
    down, up = STYLES["kohya"]
    assert list(apply(write(tmp_path / "a.safetensors", {down: DOWN, up: UP}), whole)) == [
        f"model.diffusion_model.{TO_Q}"
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_oops.weight"], "is not the name of an adapter's tensor"),
        (["lora_unet_x.a1.weight"], "belongs to GLoRA"),
        (["base_model.model.x.lora_A.weight"], "needs its adapter_config.json"),
        (["x.lora_A.one.weight", "x.lora_A.two.weight"], "are the same factor of one module"),
    ],
)
def test_names_without_a_place_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(write(tmp_path / "a.safetensors", dict.fromkeys(names, torch.zeros(2, 2))))


def test_a_missing_half_is_refused(unet: Path, tmp_path: Path) -> None:
    for name, missing in (("lora_down.weight", "B of"), ("lora_up.weight", "A of"), ("alpha", "is incomplete")):
        tensor = torch.tensor(1.0) if name == "alpha" else DOWN
        adapter = open_adapter(write(tmp_path / "a.safetensors", {f"{flat(TO_Q)}.{name}": tensor}))
        with pytest.raises(AdapterError, match=missing):
            adapter.bind(open_checkpoint(unet))


def test_a_file_for_another_model_names_the_first_clash(unet: Path, tmp_path: Path) -> None:
    down, up = STYLES["kohya"]
    adapter = open_adapter(write(tmp_path / "a.safetensors", {down: numbers(2, 7), up: UP}))
    with pytest.raises(AdapterError, match=r"to_q\.weight is \[8, 6\] in the base, the adapter was made for \[8, 7\]"):
        adapter.bind(open_checkpoint(unet))


def test_factors_that_cannot_be_used(unet: Path, tmp_path: Path) -> None:
    blocks = {f"{flat(CONV)}.oft_blocks": numbers(4, 2, 2), f"{flat(CONV)}.rescale": numbers(3)}
    with pytest.raises(AdapterError, match="the adapter was made for"):
        open_adapter(write(tmp_path / "a.safetensors", blocks)).bind(open_checkpoint(unet))
    with pytest.raises(AdapterError, match=r"alpha is \[2\], not one number"):
        open_adapter(write(tmp_path / "a.safetensors", {f"{flat(CONV)}.alpha": numbers(2)}))
