"""One format into another and back: the same numbers under the same names; and what inspection tells."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.convert import convert
from mergekit_px.adapters.describe import describe_adapter
from mergekit_px.adapters.lora_modules import LoraModule, read_lora_modules
from mergekit_px.adapters.open import open_adapter
from mergekit_px.adapters.save import peft_config, save_diffusers, save_kohya, save_peft
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import AdapterError, OutputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

BASE = {
    "down_blocks.0.attn.to_q.weight": (8, 6),
    "down_blocks.0.attn.to_out.0.weight": (6, 6),
    "down_blocks.0.conv_in.weight": (8, 6, 3, 3),
}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def base(folder: Path) -> Checkpoint:
    save_file({name: numbers(*shape) for name, shape in BASE.items()}, folder / "base.safetensors")
    return open_checkpoint(folder / "base.safetensors")


def modules(dtype: torch.dtype = torch.float32, dora: bool = False) -> list[LoraModule]:
    found = []
    for number, (name, shape) in enumerate(BASE.items()):
        rank, kernel = 2 + number % 2, [1] * (len(shape) - 2)
        a, b = numbers(rank, *shape[1:]).to(dtype), numbers(shape[0], rank, *kernel).to(dtype)
        magnitude = numbers(shape[0]).abs().to(dtype) if dora else None
        found.append(LoraModule(name.removesuffix(".weight"), a, b, alpha=[6.0, 0.1, 4.0][number], magnitude=magnitude))
    return found


def peft_adapter(folder: Path, *, dtype: torch.dtype = torch.float32, dora: bool = False) -> Adapter:
    save_peft(folder, modules(dtype, dora), base_model_name="org/base", fields={"task_type": "CAUSAL_LM"})
    return open_adapter(folder)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("between", ["kohya", "diffusers"])
def test_there_and_back_is_the_identity(between: str, dtype: torch.dtype, dora: bool, tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    adapter = peft_adapter(tmp_path / "peft", dtype=dtype, dora=dora)
    convert(adapter, tmp_path / "other.safetensors", between)
    convert(open_adapter(tmp_path / "other.safetensors"), tmp_path / "back", "peft", base=checkpoint)

    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "back"))
    changed = {name for name in one if one[name] != other.get(name)}
    assert changed <= {"base_model_name_or_path", "task_type"}


@pytest.mark.parametrize("between", ["kohya", "diffusers"])
def test_every_format_changes_the_base_alike(between: str, tmp_path: Path) -> None:
    checkpoint, tensors = base(tmp_path), None
    adapter = peft_adapter(tmp_path / "peft", dora=True)
    convert(adapter, tmp_path / "other.safetensors", between)
    results = []
    for place, file in (("peft", "peft/adapter_model.safetensors"), ("other.safetensors", "other.safetensors")):
        stored, tensors = load_file(tmp_path / file), load_file(tmp_path / "base.safetensors")
        binding = open_adapter(tmp_path / place).bind(checkpoint)
        results.append(
            {
                name: patch.merged(tensors[name], {role: stored[t.name] for role, t in patch.factors.items()})
                for name, patch in binding.items()
            }
        )
    assert set(results[0]) == set(results[1]) == set(BASE)
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], atol=1e-6, rtol=1e-6)


def test_rank_stabilised_scales_survive(tmp_path: Path) -> None:
    save_peft(tmp_path / "a", modules()[:1], fields={"use_rslora": True})
    adapter = open_adapter(tmp_path / "a")
    convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    back = read_lora_modules(open_adapter(tmp_path / "kohya.safetensors"), base(tmp_path))
    assert back[0].scale == pytest.approx(6 / math.sqrt(2), rel=1e-12)
    assert read_lora_modules(adapter)[0].scale == back[0].scale


def test_flat_names_need_the_base_to_become_dotted(tmp_path: Path) -> None:
    convert(peft_adapter(tmp_path / "peft"), tmp_path / "kohya.safetensors", "kohya")
    kohya = open_adapter(tmp_path / "kohya.safetensors")
    with pytest.raises(AdapterError, match="underscores for dots; give the base model"):
        convert(kohya, tmp_path / "back", "peft")
    convert(kohya, tmp_path / "again.safetensors", "kohya")
    one, other = (load_file(tmp_path / name) for name in ("kohya.safetensors", "again.safetensors"))
    assert {name: t.tolist() for name, t in one.items()} == {name: t.tolist() for name, t in other.items()}


def test_one_component_of_several(tmp_path: Path) -> None:
    text = LoraModule("text_model.q_proj", numbers(2, 4), numbers(4, 2), alpha=2.0, component="text_encoder")
    save_diffusers(tmp_path / "both.safetensors", [*modules(), text])
    adapter = open_adapter(tmp_path / "both.safetensors")
    convert(adapter, tmp_path / "text", "peft", component="text_encoder")
    assert [module.name for module in read_lora_modules(open_adapter(tmp_path / "text"))] == ["text_model.q_proj"]
    convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    assert "lora_te_text_model_q_proj.alpha" in load_file(tmp_path / "kohya.safetensors")
    with pytest.raises(AdapterError, match="nothing for the component text_encoder_2"):
        convert(adapter, tmp_path / "none", "peft", component="text_encoder_2")


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    embedding = [LoraModule("wte", numbers(2, 9), numbers(4, 2), alpha=2.0, embedding=True)]
    for save in (save_kohya, save_diffusers):
        with pytest.raises(AdapterError, match="embedding"):
            save(tmp_path / "a.safetensors", embedding)
    clash = [LoraModule(name, numbers(2, 4), numbers(4, 2), alpha=2.0) for name in ("a.b_c", "a_b.c")]
    with pytest.raises(AdapterError, match="two modules would both be named lora_unet_a_b_c"):
        save_kohya(tmp_path / "a.safetensors", clash)
    with pytest.raises(AdapterError, match="unknown component vae"):
        save_kohya(tmp_path / "a.safetensors", modules(), component="vae")
    save_kohya(tmp_path / "a.safetensors", modules())
    with pytest.raises(OutputError, match="such a file already"):
        save_kohya(tmp_path / "a.safetensors", modules())


def test_other_kinds_are_not_converted(tmp_path: Path) -> None:
    folder = tmp_path / "ia3"
    folder.mkdir()
    save_file({"base_model.model.m.ia3_l": numbers(4, 1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="IA3 is not LoRA"):
        convert(open_adapter(folder), tmp_path / "x.safetensors", "kohya")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out_q = nn.Linear(6, 8), nn.Linear(6, 8)
        self.block = nn.ModuleDict({"q": nn.Linear(6, 8)})
        self.conv, self.wte = nn.Conv2d(6, 8, 3), nn.Embedding(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_what_is_saved(dora: bool, tmp_path: Path) -> None:
    """Ranks and alphas that differ between modules whose names end alike, convolutions, embeddings."""
    torch.manual_seed(0)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = [
        LoraModule("q", numbers(2, 6), numbers(8, 2), alpha=4.0),
        LoraModule("out_q", numbers(3, 6), numbers(8, 3), alpha=4.0),
        LoraModule("block.q", numbers(3, 6), numbers(8, 3), alpha=1.5),
        LoraModule("conv", numbers(3, 6, 3, 3), numbers(8, 3, 1, 1), alpha=4.0),
        LoraModule("wte", numbers(3, 9), numbers(4, 3), alpha=4.0, embedding=True),
    ]
    if dora:
        magnitudes = [numbers(8).abs(), numbers(8).abs(), numbers(8).abs(), numbers(8).abs(), numbers(4).abs()]
        saved = [
            LoraModule(m.name, m.a, m.b, m.alpha, magnitude, m.embedding)
            for m, magnitude in zip(saved, magnitudes, strict=True)
        ]
    save_peft(tmp_path / "a", saved)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload().state_dict()
    for module in saved:
        delta = module.scale * (module.b.flatten(1) @ module.a.flatten(1))
        weight = before[f"{module.name}.weight"]
        expected = weight + (delta.T if module.embedding else delta).reshape(weight.shape)
        if module.magnitude is not None:
            axis = 1 if module.embedding else 0
            others = [each for each in range(weight.dim()) if each != axis]
            norm = torch.linalg.vector_norm(expected, dim=others, keepdim=True)
            expected = expected * module.magnitude.reshape(norm.shape) / norm
        torch.testing.assert_close(merged[f"{module.name}.weight"], expected, atol=1e-5, rtol=1e-5)


def test_patterns_name_only_the_exceptions() -> None:
    config = peft_config(modules())
    assert (config["r"], config["rank_pattern"]) == (2, {r"down_blocks\.0\.attn\.to_out\.0": 3})
    assert config["lora_alpha"] == 0.1
    assert config["alpha_pattern"] == {r"down_blocks\.0\.attn\.to_q": 6, r"down_blocks\.0\.conv_in": 4}


# --- inspection ----------------------------------------------------------------------------------------------


def test_inspection_tells_ranks_scales_and_norms(tmp_path: Path) -> None:
    summary = describe_adapter(peft_adapter(tmp_path / "a"))
    assert (summary.kind, summary.base_model_name, summary.refusal) == ("LORA", "org/base", None)
    assert summary.parameters == sum(m.a.numel() + m.b.numel() for m in modules())
    found = {module.name: module for module in summary.modules}
    for module in modules():
        told = found[module.name]
        update = module.scale * (module.b.flatten(1) @ module.a.flatten(1))
        assert (told.rank, told.scale) == (module.rank, pytest.approx(module.scale))
        assert told.norm == pytest.approx(float(update.norm()), rel=1e-5)
    assert all(module.norm is None for module in describe_adapter(open_adapter(tmp_path / "a"), norms=False).modules)


def test_inspection_of_what_cannot_be_merged_says_why(tmp_path: Path) -> None:
    save_peft(tmp_path / "a", modules(), fields={"init_lora_weights": "pissa"})
    summary = describe_adapter(open_adapter(tmp_path / "a"))
    assert "relative to the residual" in summary.refusal
    assert [module.rank for module in summary.modules] == [None] * 3


def lora_file(path: Path, names: list[str]) -> Path:
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": numbers(2, 6), f"{name}.lora_up.weight": numbers(8, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ["lora_te1_text_model_mlp_fc1"],
        ["lora_te_text_model_mlp_fc1", "lora_unet_mid_block_proj"],
        ["lora_te1_text_model_mlp_fc1", "lora_te2_text_model_mlp_fc1", "lora_unet_input_blocks_1_proj_in"],
        ["lora_te1_text_model_mlp_fc1", "lora_te3_encoder_block_0_wo", "lora_transformer_blocks_0_proj"],
    ],
)
def test_kohyas_names_stay_as_they_are(names: list[str], tmp_path: Path) -> None:
    source = lora_file(tmp_path / "a.safetensors", names)
    convert(open_adapter(source), tmp_path / "b.safetensors", "kohya")
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert {name: tensor.tolist() for name, tensor in before.items()} == {
        name: tensor.tolist() for name, tensor in after.items()
    }


@pytest.mark.parametrize(("second", "prefix"), [([], "lora_te"), (["text_encoder_2"], "lora_te1")])
def test_the_first_text_encoder_is_numbered_beside_others(second: list[str], prefix: str, tmp_path: Path) -> None:
    parts = ["unet", "text_encoder", *second]
    loras = [LoraModule("a.proj", numbers(2, 6), numbers(8, 2), alpha=2.0, component=part) for part in parts]
    save_kohya(tmp_path / "a.safetensors", loras)
    written = {name.removesuffix("_a_proj.alpha") for name in load_file(tmp_path / "a.safetensors") if "alpha" in name}
    assert written == {"lora_unet", prefix, *(["lora_te2"] if second else [])}


STORED = {
    "model.diffusion_model.input_blocks.1.1.proj_in": "lora_unet_input_blocks_1_1_proj_in",
    "conditioner.embedders.0.transformer.text_model.fc1": "lora_te1_text_model_fc1",
    "text_encoders.t5xxl.transformer.encoder.wo": "lora_te3_encoder_wo",
}


def test_names_of_a_checkpoint_in_one_file_become_those_of_its_components(tmp_path: Path) -> None:
    save_kohya(
        tmp_path / "a.safetensors", [LoraModule(name, numbers(2, 6), numbers(8, 2), alpha=2.0) for name in STORED]
    )
    written = {name.removesuffix(".alpha") for name in load_file(tmp_path / "a.safetensors") if "alpha" in name}
    assert written == set(STORED.values())
    back = open_adapter(tmp_path / "a.safetensors")
    assert {module.component for module in back.keys.modules.values()} == {"unet", "text_encoder", "text_encoder_3"}


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("first_stage_model.decoder.conv_in", save_kohya, "no place"),
        ("conditioner.embedders.1.model.transformer.resblocks.0.mlp", save_kohya, "no place"),
        ("model.diffusion_model.input_blocks.1.1.proj_in", save_diffusers, "another name in diffusers"),
    ],
)
def test_what_a_format_has_no_name_for_is_refused(name: str, save: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "a.safetensors", [LoraModule(name, numbers(2, 6), numbers(8, 2), alpha=2.0)])  # type: ignore[operator]
    assert not (tmp_path / "a.safetensors").exists()


def test_two_spellings_of_one_module_are_refused(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.safetensors", ["lora_te_fc1", "lora_te1_fc1"])
    with pytest.raises(AdapterError, match="both mean one module"):
        open_adapter(path)


def test_a_peft_folder_is_of_one_part_that_is_asked_for(tmp_path: Path) -> None:
    loras = [LoraModule(f"{part}.proj", numbers(2, 6), numbers(8, 2), alpha=2.0, component=part) for part in ("unet", "text_encoder")]  # fmt: skip  # noqa: E501
    save_diffusers(tmp_path / "a.safetensors", loras)
    with pytest.raises(AdapterError, match="of one part: name it with --component"):
        convert(open_adapter(tmp_path / "a.safetensors"), tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
    convert(open_adapter(tmp_path / "a.safetensors"), tmp_path / "peft", "peft", component="unet")
    assert {name.split(".")[2] for name in load_file(tmp_path / "peft" / "adapter_model.safetensors")} == {"unet"}
