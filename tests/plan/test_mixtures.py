"""Mixtures of experts that are built of dense models load with transformers and compute what their experts say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.cli import main
from mergekit_px.plan.mixture_families import FAMILIES, Family
from mergekit_px.plan.mixtures import BuiltMixture
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4, "n_routed_experts": 2, "first_k_dense_replace": 2,
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 5000.0},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "granite": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
TOKENS = (torch.arange(24).reshape(2, 12) * 7) % 64


def dense(folder: Path, model_type: str, seed: int, **changes: Any) -> Any:
    """A small dense model, saved."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **(SIZE | DENSE[model_type] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval().save_pretrained(folder)
    return model


def recipe(folder: Path, mixture: Mapping[str, Any], models: int = 4) -> Path:
    """A recipe over models ``m0``, ``m1`` ... of a folder, the first of which everything but the experts is of."""
    file = folder / "recipe.yaml"
    step = {"method": "passthrough", "sources": ["m0"], "mixture": mixture}
    names = {f"m{number}": str(folder / f"m{number}") for number in range(models)}
    file.write_text(json.dumps({"pxmerge": 1, "models": names, "merge": step}))
    return file


def loaded(folder: Path) -> Any:
    """The model as a user loads it; nothing may be missing, left over or of another shape."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


class HandMade(torch.nn.Module):
    """A mixture as its papers write it, over the MLPs of dense models."""

    def __init__(self, experts: list[Any], shared: Any, tensors: Mapping[str, torch.Tensor], kind: str) -> None:
        super().__init__()
        self.experts, self.shared, self.kind = torch.nn.ModuleList(experts), shared, kind
        self.router = next(tensors[name] for name in tensors if name.endswith(("gate.weight", "router.layer.weight")))
        self.gate = next((tensors[name] for name in tensors if name.endswith("shared_expert_gate.weight")), None)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scores = states @ self.router.T
        sigmoid = self.kind in ("dots1", "deepseek_v3")
        scores = scores.sigmoid() if sigmoid else scores.softmax(-1)
        best, chosen = scores.topk(2, dim=-1)
        if self.kind != "deepseek_v2":
            best = best / best.sum(-1, keepdim=True)
        outputs = torch.stack([expert(states) for expert in self.experts], dim=-2)
        mixed = (outputs.gather(-2, chosen[..., None].expand(*chosen.shape, states.shape[-1])) * best[..., None]).sum(
            -2
        )
        if self.shared is None:
            return mixed
        weight = 1.0 if self.gate is None else (states @ self.gate.T).sigmoid()
        return mixed + weight * self.shared(states)


@pytest.mark.parametrize(
    ("source", "shared", "family"),
    [
        ("mistral", False, "mixtral"),
        ("llama", True, "qwen2_moe"),
        ("qwen3", False, "qwen3_moe"),
        ("qwen3", True, "dots1"),
        ("deepseek_v2", True, "deepseek_v2"),
        ("deepseek_v3", True, "deepseek_v3"),
        ("granite", True, "granitemoeshared"),
    ],
)
def test_a_built_mixture_computes_what_its_experts_say(
    source: str, shared: bool, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [dense(tmp_path / f"m{number}", source, number) for number in range(4)]
    mixture = {"experts": ["m1", "m2", "m3"], "router": {"kind": "random", "scale": 0.5}}
    file = recipe(tmp_path, mixture | ({"shared": "m0"} if shared else {}))
    assert main(["moe", "build", str(file), "-o", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == family
    built, tensors = loaded(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    by_hand = models[0]
    for number, layer in enumerate(by_hand.model.layers):
        own = {name: one for name, one in tensors.items() if name.startswith(f"model.layers.{number}.")}
        experts = [model.model.layers[number].mlp for model in models[1:]]
        layer.mlp = HandMade(experts, layer.mlp if shared else None, own, family)
    with torch.no_grad():
        expected, found = by_hand(TOKENS).logits, built(TOKENS).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    built.save_pretrained(tmp_path / "again")  # as its class stores it, name by name
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def small(folder: Path, seed: int, **changes: torch.Tensor) -> None:
    write_checkpoint(folder, tiny_llama_tensors(seed=seed) | changes, config=tiny_llama_config())


@pytest.mark.parametrize(
    ("mixture", "code", "message"),
    [
        ({"experts": []}, 2, "a mixture without experts"),
        ({"experts": ["m1", "mm"]}, 2, "no model or step is named 'mm'; known are"),
        ({"experts": ["m1", "m2"], "experts_per_token": 3}, 2, "3 experts for each token, and 2 are given"),
        ({"experts": ["m1", "m2"], "family": "mixtrall"}, 2, "did you mean 'mixtral'"),
        ({"experts": ["m1", "m2"], "family": "qwen3_moe"}, 4, "qwen3_moe is built of qwen3, and 'm0' is llama"),
        ({"experts": ["m1", "m2"], "family": "qwen2_moe"}, 2, "write shared: MODEL"),
        ({"experts": ["m1", "m2"], "family": "mixtral", "shared": "m0"}, 2, "mixtral has no shared expert"),
        ({"experts": ["m1", "wide"]}, 4, "expert 1: 'model.layers.1.mlp.up_proj.weight' has shape [4, 4] in 'wide'"),
        ({"experts": ["m1", "moe"]}, 4, "expert 1 is 'moe', which has no 'model.layers.0.mlp.gate_proj.weight'"),
        ({"experts": ["m1", "m2"], "router": "hidden"}, 2, "made of prompts, and this expert has none"),
        ({"experts": ["m1", {"model": "m2", "noise": -1}]}, 2, "'noise' must be a finite number from 0 on"),
        ({"experts": ["m1", "m2"], "router": {"kind": "file"}}, 2, "it is not said which file"),
        ({"experts": ["m1", "m2"], "router": {"kind": "file", "model": "rows"}}, 4, "a router has a row for each"),
        ({"experts": ["m1", "m2"], "router": {"kind": "file", "model": "m1"}}, 4, "has no 'layers.0.router'"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(
    mixture: dict[str, Any], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        small(tmp_path / f"m{number}", number)
    small(tmp_path / "wide", 1, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(4, 4)})
    write_checkpoint(tmp_path / "moe", {"model.layers.0.mlp.experts.0.w1.weight": torch.zeros(4, 4)})
    write_checkpoint(tmp_path / "rows", {f"layers.{layer}.router": torch.zeros(3, 16) for layer in range(4)})
    file = tmp_path / "recipe.yaml"
    models = {name: str(tmp_path / name) for name in ("m0", "m1", "m2", "wide", "moe", "rows")}
    step = {"method": "passthrough", "sources": ["m0"], "mixture": mixture}
    file.write_text(json.dumps({"models": models, "merge": step}))
    assert main(["moe", "build", str(file), "-o", str(tmp_path / "out")]) == code
    told = capsys.readouterr().err
    assert message in " ".join(told.split()) and not (tmp_path / "out").exists()


def test_noise_scale_and_rows_of_a_file(tmp_path: Path) -> None:
    """Noise is of the deviation that is asked for, scale that of the output, and rows are those of the file."""
    for number in range(3):
        small(tmp_path / f"m{number}", number)
    tensors = tiny_llama_tensors(seed=1)
    layers = len([name for name in tensors if name.endswith("mlp.up_proj.weight")])
    width = tensors["model.norm.weight"].shape[0]
    rows = {f"layers.{layer}.router": torch.randn(2, width) for layer in range(layers)}
    write_checkpoint(tmp_path / "m3", rows)
    experts = [{"model": "m1", "noise": 0.5}, {"model": "m1", "scale": 0.25}]
    file = recipe(tmp_path, {"experts": experts, "router": {"kind": "file", "model": "m3"}})
    assert main(["moe", "build", str(file), "-o", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    built = load_file(tmp_path / "out/model.safetensors")
    where = "model.layers.0.block_sparse_moe"
    up, down = (tensors[f"model.layers.0.mlp.{part}.weight"].float() for part in ("up_proj", "down_proj"))
    noise = built[f"{where}.experts.0.w3.weight"] - up
    assert 0.4 < noise.std() < 0.6 and abs(noise.mean()) < 0.1
    assert torch.equal(built[f"{where}.experts.1.w2.weight"], 0.25 * down)
    assert torch.equal(built[f"{where}.experts.1.w3.weight"], up)
    assert torch.equal(built[f"{where}.gate.weight"], rows["layers.0.router"])


@pytest.mark.parametrize("shared", [{}, {"shared": "m0"}])
def test_the_first_deepseek_layout(shared: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers has no class for it, so its names and config are compared with those of its authors' code."""
    for number in range(3):
        small(tmp_path / f"m{number}", number)
    file = recipe(tmp_path, {"family": "deepseek", "experts": ["m1", "m2"], **shared}, models=3)
    assert main(["moe", "build", str(file), "-o", str(tmp_path / "out")]) == 0
    assert "transformers has no class for deepseek" in " ".join(capsys.readouterr().err.split())
    names = load_file(tmp_path / "out/model.safetensors").keys()
    own = {name.removeprefix("model.layers.0.mlp.") for name in names if name.startswith("model.layers.0.mlp.")}
    parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    where = ["experts.0", "experts.1", *(["shared_experts"] if shared else [])]
    assert own == {"gate.weight", *(f"{place}.{part}" for place in where for part in parts)}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["n_routed_experts"], config["n_shared_experts"]) == (2, 1 if shared else None)
    assert (config["model_type"], config["first_k_dense_replace"]) == ("deepseek", 0)


SAID: list[dict[str, Any]] = [
    {},
    {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 3},
    {"sliding_window": None},
    {"sliding_window": 77, "use_sliding_window": True, "max_window_layers": 20},
    {"sliding_window": 77, "use_sliding_window": False},
    {"rope_theta": 5.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
]
PAIRS = [(family, dense) for family in FAMILIES for dense in family.dense if not family.unloaded]


@pytest.mark.parametrize(("family", "dense"), PAIRS, ids=[f"{dense}-{family.model_type}" for family, dense in PAIRS])
def test_the_mixtures_config_means_what_the_dense_one_does(family: Family, dense: str, tmp_path: Path) -> None:
    """What a config leaves unsaid is written down where the mixture's class would take something else for granted."""

    def read(config: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        # No window is 0 in one of the classes; the width of a head is left to the model in others.
        head = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        return found | {"sliding_window": found.get("sliding_window") or None, "head_dim": head}

    follows = {"model_type", "architectures", "max_window_layers", "use_sliding_window", *family.entries}
    if dense == "llama":  # which has no windows, whatever its config says of them
        follows.add("sliding_window")
    for said in SAID:
        config = {"model_type": dense, **said}
        mixture, _ = BuiltMixture(family, 4, 2, False, family.shared is not None).followed(config)
        before, after = read(config), read(mixture)
        assert not [key for key in before.keys() & after.keys() - follows if before[key] != after[key]]
        assert dense != "llama" or after["sliding_window"] is None


def test_a_mixture_whose_router_needs_no_prompts_is_built_without_torch(tmp_path: Path) -> None:
    for number in range(3):
        small(tmp_path / f"m{number}", number)
    file = recipe(tmp_path, {"experts": ["m1", {"model": "m2", "noise": 0.1}]}, models=3)
    code = (
        "import sys\n"
        "from mergekit_px.cli import main\n"
        f"assert main(['moe', 'build', {str(file)!r}, '-o', 'out']) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    built = load_file(tmp_path / "out/model.safetensors")
    router = built["model.layers.0.block_sparse_moe.gate.weight"].float()
    assert 0.01 < router.std() < 0.03 and router.shape[0] == 2
