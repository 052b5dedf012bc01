"""Every kind of adapter that can be merged, with PEFT itself as the oracle: small modules, random factors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.open import Checkpoint, open_checkpoint
from mergekit_px.cli import main
from mergekit_px.errors import AdapterError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.lin = nn.Linear(12, 20)
        self.sq = nn.Linear(12, 12, bias=False)
        self.big = nn.Linear(144, 144)
        self.c1 = nn.Conv1d(4, 6, 3)
        self.c2 = nn.Conv2d(4, 6, 3)
        self.c11 = nn.Conv2d(4, 6, 1)
        self.c3 = nn.Conv3d(4, 6, 2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(12)
        self.attn = nn.MultiheadAttention(12, 2)
        self.gpt = Conv1D(20, 12)
        self.gpt_square = Conv1D(12, 12)
        self.classifier = nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.sq(self.emb(tokens))))


def save(module: nn.Module, path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)


def train(model: nn.Module) -> None:
    """Give every trained tensor values of its own; those near one stay near one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if "ia3" in name or "magnitude" in name else 0.0
                parameter.copy_(torch.randn_like(parameter) * 0.3 + centre)


def apply(adapter_folder: Path, base_file: Path, options: BindOptions | None = None) -> dict[str, torch.Tensor]:
    """The base with the adapter merged, each tensor whole and, where it may be cut, in two uneven pieces."""
    base = open_checkpoint(base_file)
    adapter = open_adapter(adapter_folder)
    tensors = load_file(base_file)
    stored = load_file(adapter_folder / "adapter_model.safetensors")
    merged = dict(tensors)
    used: set[str] = set()
    for target, patch in adapter.bind(base, options).items():
        factors = {role: stored[tensor.name] for role, tensor in patch.factors.items()}
        used |= {tensor.name for tensor in patch.factors.values()}
        source = None if patch.source is None else tensors[patch.source]
        before = None if source is None else source.clone()
        merged[target] = patch.merged(source, factors)
        assert tuple(merged[target].shape) == patch.out_shape
        assert source is None or torch.equal(source, before)
        if patch.access == "rows":
            cut = patch.out_shape[0] // 2 + 1
            pieces = [
                patch.merged(None if source is None else source[rows], factors, rows)
                for rows in (slice(0, cut), slice(cut, patch.out_shape[0]))
            ]
            torch.testing.assert_close(torch.cat(pieces), merged[target], atol=1e-6, rtol=1e-6)
        if source is not None and source.shape == merged[target].shape:
            change = patch.change(torch.zeros_like(source) if patch.additive else source, factors)
            torch.testing.assert_close(source + change, merged[target], atol=1e-6, rtol=1e-6)
        pair = patch.low_rank(factors)
        if pair is not None:
            delta = merged[target] - source
            torch.testing.assert_close((pair[0] @ pair[1]).reshape(delta.shape), delta, atol=1e-6, rtol=1e-5)
    # a module saved whole has its bias three times in the file, of which one counts
    unused = {name for name in set(stored) - used if not {"modules_to_save", "original_module"} & set(name.split("."))}
    assert not unused
    return merged


def applied_by_command(folder: Path) -> dict[str, torch.Tensor]:
    words = ["adapter", "apply", str(folder / "base.safetensors"), str(folder / "adapter"), "-o", str(folder / "out")]
    assert main(words) == 0
    return load_file(folder / "out" / "model.safetensors")


LAYERS = ["lin", "sq", "c1", "c2", "c11", "c3", "emb"]
STORED_IN_OUT = ["gpt", "gpt_square"]
LYCORIS = ["lin", "big", "c1", "c2", "c11"]
SQUARES = ["lin", "sq"]


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | fields))


CASES = {
    "lora": lambda: lora(target_modules=LAYERS),
    "lora stored (in, out)": lambda: lora(target_modules=STORED_IN_OUT, fan_in_fan_out=True),
    "lora on both orders": lambda: lora(target_modules=["lin", "gpt"]),
    "dora stored (in, out)": lambda: lora(use_dora=True, target_modules=STORED_IN_OUT, fan_in_fan_out=True),
    "rslora with patterns": lambda: lora(
        use_rslora=True, target_modules=LAYERS, rank_pattern={"lin": 3, "c.": 2}, alpha_pattern={"sq": 9, "^c2": 1}
    ),
    "lora bias": lambda: lora(lora_bias=True, target_modules=["lin", "c1", "c2"]),
    "attention": lambda: lora(target_modules=["attn"], rank_pattern={"attn": 3}),
    "gaussian start": lambda: lora(target_modules=SQUARES, init_lora_weights="gaussian"),
    "dora": lambda: lora(use_dora=True, target_modules=LAYERS),
    "modules to save and all biases": lambda: lora(
        bias="all", modules_to_save=["classifier", "norm"], target_modules=SQUARES
    ),
    "biases of adapted layers": lambda: lora(bias="lora_only", target_modules=SQUARES),
    "bias trained and adapted": lambda: lora(bias="all", lora_bias=True, target_modules=["lin"]),
    "token rows beside lora": lambda: lora(trainable_token_indices={"emb": [1, 5, 7]}, target_modules=SQUARES),
    "token rows": lambda: peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[3, 0, 10]),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["lin", "sq", "c2"], init_r=5),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS, rank_pattern={"lin": 2}),
    "loha tucker": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=LYCORIS, alpha_pattern={"lin": 3}),
    "lokr split": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=LYCORIS, decompose_both=True),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=1, alpha=6, target_modules=["lin", "big", "c2"], use_effective_conv2d=True, decompose_factor=2
    ),
    "lokr whole": lambda: peft.LoKrConfig(r=50, alpha=6, target_modules=LYCORIS),
    "ia3": lambda: peft.IA3Config(
        target_modules=["lin", "sq", "c2", "c3", "grouped"], feedforward_modules=["sq", "c3", "grouped"]
    ),
    "ia3 stored (in, out)": lambda: peft.IA3Config(
        target_modules=STORED_IN_OUT, feedforward_modules=["gpt"], fan_in_fan_out=True
    ),
    "vera stored (in, out)": lambda: peft.VeraConfig(r=5, target_modules=STORED_IN_OUT, fan_in_fan_out=True),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["lin", "sq"]),
    "vera drawn again": lambda: peft.VeraConfig(
        r=5, target_modules=["lin", "sq"], save_projection=False, projection_prng_key=7
    ),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["lin", "sq", "c2"], init_weights=False),
    "hra orthonormal": lambda: peft.HRAConfig(
        r=4, target_modules=["lin", "sq", "c2"], apply_GS=True, init_weights=False
    ),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=["lin", "sq", "c1", "c2", "c11", "c3", "emb"]),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "shira": lambda: peft.ShiraConfig(r=1, target_modules=SQUARES),
    "miss": lambda: peft.MissConfig(r=4, target_modules=SQUARES),
    "miss with a short block": lambda: peft.MissConfig(r=5, target_modules=SQUARES),
    "miss bat": lambda: peft.MissConfig(r=4, target_modules=SQUARES, init_weights="bat"),
    "miss mini": lambda: peft.MissConfig(r=4, mini_r=4, target_modules=SQUARES, init_weights="mini"),
    **{
        f"oft {'neumann' if neumann else 'exact'} {name}": (
            lambda neumann=neumann, fields=fields: peft.OFTConfig(
                target_modules=["lin", "sq", "c2", "emb"], oft_block_size=4, use_cayley_neumann=neumann, **fields
            )
        )
        for neumann in (True, False)
        for name, fields in {
            "blocks": {},
            "constrained": {"coft": True, "eps": 0.5},
            "shared block": {"block_share": True},
        }.items()
    },
    **{
        f"oft with {terms} terms": (
            lambda terms=terms: peft.OFTConfig(
                target_modules=["lin"], oft_block_size=4, use_cayley_neumann=True, num_cayley_neumann_terms=terms
            )
        )
        for terms in (2, 3, 4, 7)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small()
    save(module, tmp_path / "base.safetensors")
    model = peft.get_peft_model(module, CASES[name]())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()

    got = apply(tmp_path / "adapter", tmp_path / "base.safetensors")
    by_command = applied_by_command(tmp_path)

    assert set(got) == set(by_command) == set(expected)
    for tensor_name, tensor in expected.items():
        for found in (got, by_command):
            torch.testing.assert_close(
                found[tensor_name], tensor, atol=TOLERANCE, rtol=0, msg=lambda text, at=tensor_name: f"{at}: {text}"
            )
    before = load_file(tmp_path / "base.safetensors")
    assert any(not torch.equal(tensor, before[tensor_name]) for tensor_name, tensor in got.items())


class Experts(nn.Module):
    def __init__(self, experts: int, inside: int, hidden: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = ((experts, 2 * hidden, inside), (experts, inside, hidden))
        shapes = tuple((e, b, a) if transposed else (e, a, b) for e, a, b in shapes)
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))


class Mixture(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(**fields)})}) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_stacked_experts_equal_those_of_peft(transposed: bool, parameters: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Mixture(experts=3, inside=10, hidden=6, transposed=transposed)
    save(module, tmp_path / "base.safetensors")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in parameters],
        rank_pattern={"1.mlp.experts.down_proj": 3},
    )
    model = peft.get_peft_model(module, config)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()

    got = apply(tmp_path / "adapter", tmp_path / "base.safetensors")

    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=TOLERANCE, rtol=0)


def test_stacked_experts_go_to_the_experts_own_tensors(tmp_path: Path) -> None:
    """Transformers stacks gate over up, and the experts; the file has each by itself, under another block name."""
    torch.manual_seed(0)
    module = Mixture(experts=3, inside=10, hidden=6, transposed=False)
    base = {}
    for name, tensor in module.state_dict().items():
        prefix = name.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")[0]
        for expert, matrix in enumerate(tensor):
            if name.endswith("gate_up_proj"):
                base[f"model.{prefix}.{expert}.w1.weight"] = matrix[:6].clone()
                base[f"model.{prefix}.{expert}.w3.weight"] = matrix[6:].clone()
            else:
                base[f"model.{prefix}.{expert}.w2.weight"] = matrix.clone()
    save_file(base, tmp_path / "base.safetensors")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()

    got = apply(tmp_path / "adapter", tmp_path / "base.safetensors")

    assert set(got) == set(base)
    for layer in range(2):
        place = f"model.layers.{layer}.block_sparse_moe.experts"
        stacked = torch.stack(
            [torch.cat([got[f"{place}.{e}.w1.weight"], got[f"{place}.{e}.w3.weight"]]) for e in range(3)]
        )
        torch.testing.assert_close(stacked, expected[f"layers.{layer}.mlp.experts.gate_up_proj"], atol=1e-5, rtol=0)
        stacked = torch.stack([got[f"{place}.{e}.w2.weight"] for e in range(3)])
        torch.testing.assert_close(stacked, expected[f"layers.{layer}.mlp.experts.down_proj"], atol=1e-5, rtol=0)


def test_attention_output_once_is_a_choice(tmp_path: Path) -> None:
    """PEFT adds the out_proj part twice; the formula of LoRA, once."""
    torch.manual_seed(0)
    module = Small()
    save(module, tmp_path / "base.safetensors")
    model = peft.get_peft_model(module, lora(target_modules=["attn"]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "base.safetensors")["attn.out_proj.weight"]

    twice = apply(tmp_path / "adapter", tmp_path / "base.safetensors")["attn.out_proj.weight"]
    once = apply(tmp_path / "adapter", tmp_path / "base.safetensors", BindOptions(attention_output="once"))

    torch.testing.assert_close(twice - before, 2 * (once["attn.out_proj.weight"] - before), atol=1e-6, rtol=1e-5)


OF_EACH_KIND = ["lora", "adalora", "loha", "lokr", "ia3", "oft exact blocks", "vera", "hra", "hira", "ln tuning"]
OF_EACH_KIND += ["shira", "miss", "token rows"]


@pytest.mark.parametrize(
    "stranger", ["lin.strange", "lin.strange.weight", "nowhere.lora_A.weight", "lin.lora_C.weight"]
)
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_no_tensor_of_an_adapter_is_skipped(name: str, stranger: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small()
    save(module, tmp_path / "base.safetensors")
    peft.get_peft_model(module, CASES[name]()).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{stranger}": torch.ones(4, 4)}, file)
    with pytest.raises(AdapterError, match=stranger.split(".")[0]):
        open_adapter(tmp_path / "adapter").bind(open_checkpoint(tmp_path / "base.safetensors"))


def square_lora(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    factors = {f"h.0.c_proj.lora_{letter}.weight": torch.ones(2, 2).to(dtype) for letter in "AB"}
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def square_base(folder: Path, config: dict[str, str]) -> Checkpoint:
    folder.mkdir()
    save_file({"h.0.c_proj.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "turned"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt2"}, True),
        ({}, True),
        ({"model_type": "own", "auto_map": "x"}, True),
    ],
)
def test_square_matrices_of_linear_layers_are_never_turned(
    config: dict[str, str], turned: bool, tmp_path: Path
) -> None:
    base = square_base(tmp_path / "base", config)
    for flag in (False, True):
        patches = open_adapter(square_lora(tmp_path / str(flag), fan_in_fan_out=flag)).bind(base)
        assert patches["h.0.c_proj.weight"].transposed is (flag and turned)


def test_factors_of_integers_are_refused(tmp_path: Path) -> None:
    adapter = open_adapter(square_lora(tmp_path / "a", torch.int8))
    with pytest.raises(AdapterError, match="is I8, and factors are no integers"):
        adapter.bind(square_base(tmp_path / "base", {}))
