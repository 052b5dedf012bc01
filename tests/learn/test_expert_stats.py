"""``pxmerge stats --what experts`` against a loop over tokens and experts, and the experts that it chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mergekit_px.cli import main

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.4,
    "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 5, "norm_topk_prob": False},
    "gpt_oss": {"num_local_experts": 5, "layer_types": ["full_attention"] * 2},
}


def mixture(folder: Path, kind: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **SIZE, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def written_data(path: Path) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 40, (6, 8)), np.ones((6, 8), dtype=np.int64)
    mask[:3, 5:] = 0
    np.savez(path, input_ids=ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100))
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, mask: Tensor, kind: str) -> list[tuple[list[float], list[float]]]:
    """(frequency, REAP) of each layer, token by token."""
    entered: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
        for layer in model.model.layers
    ]
    model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, states in zip(model.model.layers, entered, strict=True):
        router = layer.mlp.router if kind == "gpt_oss" else layer.mlp.gate
        counts, sums = [0] * 5, [0.0] * 5
        for state in states[mask.bool()]:
            scores = router.weight @ state + (router.bias if kind == "gpt_oss" else 0)
            values, chosen = scores.topk(2)
            gates = scores.softmax(0)[chosen] if kind == "qwen3_moe" else values.softmax(0)
            for gate, number in zip(gates.tolist(), chosen.tolist(), strict=True):
                counts[number] += 1
                sums[number] += gate * float(expert(layer.mlp.experts, number, state, kind).norm())
        total = sum(counts)
        found.append(([n / total for n in counts], [s / max(n, 1) for s, n in zip(sums, counts, strict=True)]))
    return found


def expert(experts: Any, number: int, state: Tensor, kind: str) -> Tensor:
    inner, outer = experts.gate_up_proj[number], experts.down_proj[number]
    if kind == "gpt_oss":
        both = state @ inner + experts.gate_up_proj_bias[number]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ outer + experts.down_proj_bias[number]
    gate, up = (inner @ state).chunk(2)
    return outer @ (functional.silu(gate) * up)


@pytest.mark.parametrize("kind", KINDS)
def test_the_use_of_experts_is_what_a_loop_finds_and_chooses_them(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mixture(tmp_path / "moe", kind)
    expected = by_hand(model, *written_data(tmp_path / "data.npz"), kind)
    file = tmp_path / "experts.safetensors"
    words = ["stats", str(tmp_path / "moe"), "--data", str(tmp_path / "data.npz"), "--what", "experts", "--batch", "4"]
    assert main([*words, "-o", str(file), "--device", "cpu", "-q"]) == 0
    found = load_file(file)
    for layer, (frequency, reap) in enumerate(expected):
        for name, values in (("frequency", frequency), ("reap", reap)):
            measured = found.pop(f"model.layers.{layer}.mlp.experts.{name}")
            torch.testing.assert_close(measured, torch.tensor(values), rtol=2e-4, atol=1e-6)
    assert not found
    for number, by in enumerate(("frequency", "reap")):
        out = tmp_path / by
        words = ["moe", "edit", str(tmp_path / "moe"), "--keep", "3", "--stats", str(file), "--by", by, "-o", str(out)]
        assert main(words) == 0, capsys.readouterr().err
        edited = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        for layer, scores in enumerate(expected):
            kept = sorted(sorted(range(5), key=lambda one: (-scores[number][one], one))[:3])
            whole, part = (one.model.layers[layer].mlp.experts.down_proj for one in (model, edited))
            assert torch.equal(part, whole[kept])


def test_statistics_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture(tmp_path / "moe", "mixtral")
    mixture(tmp_path / "other", "mixtral", seed=2)
    written_data(tmp_path / "data.npz")
    file = tmp_path / "experts.safetensors"
    data = ["--data", str(tmp_path / "data.npz"), "--device", "cpu", "-q"]
    assert main(["stats", str(tmp_path / "moe"), *data, "--what", "experts", "-o", str(file)]) == 0

    def refused(code: int, said: str, *words: object, model: str = "moe") -> None:
        assert main(["moe", "edit", str(tmp_path / model), *map(str, words), "-o", str(tmp_path / "out")]) == code
        error = " ".join(capsys.readouterr().err.split())
        assert said in error and error.count("error: ") == 1 and not (tmp_path / "out").exists()

    refused(3, "of another model", "--keep", "3", "--stats", file, model="other")
    refused(3, "holds no reap", "--keep", "3", "--stats", tmp_path / "moe")
    refused(2, "6 experts are to stay, and layer 0 has 5 scores", "--keep", "6", "--stats", file)
    refused(2, "--keep is how many experts stay, not 1 2", "--keep", "1", "2", "--stats", file)
    refused(2, "needs how many experts stay", "--stats", file)
    refused(2, "--by goes with --stats", "--keep", "3", "--by", "reap")
    refused(2, "either --drop or --stats", "--drop", "3", "--stats", file)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"0": [1, 2, 3, 4, 5]}))
    refused(2, "'model.layers.1.block_sparse_moe' would have 5 experts", "--keep", "3", "--scores", scores)
    scores.write_text(json.dumps([1, 2, 3, 4]))
    refused(2, "chosen of 4, and the model has 5", "--keep", "3", "--scores", scores)
    with safe_open(file, "pt") as opened:
        tensors, header = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    del tensors["model.layers.1.mlp.experts.reap"]
    save_file(tensors, file, metadata=header)
    refused(2, "would have 5 experts", "--keep", "3", "--stats", file)
    config = transformers.LlamaConfig(**{key: SIZE[key] for key in SIZE if "expert" not in key and "moe" not in key})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    none = tmp_path / "none.safetensors"
    assert main(["stats", str(tmp_path / "dense"), *data, "--what", "experts", "-o", str(none)]) == 3
    assert "no experts" in capsys.readouterr().err and not none.exists()
