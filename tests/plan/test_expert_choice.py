"""Experts that are kept, dropped, put in another order or merged: the mixture loads and computes what it should."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.cli import main
from mergekit_px.testing import write_checkpoint

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": None,
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "gpt_oss": {"num_local_experts": 6, "layer_types": ["full_attention"] * 2},
    "granitemoe": {"num_local_experts": 6},
    "deepseek_v3": {
        "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "head_dim": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
TOKENS = (torch.arange(24).reshape(2, 12) * 7) % 64


def mixture(folder: Path, model_type: str) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(model_type, **(SIZE | MIXTURES[model_type]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bias" in name:
                tensor.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def edited(model: Any, groups: list[list[int]], chosen: int) -> Any:
    """The model with means of its experts, made of its parameters as transformers holds them."""
    config = copy.deepcopy(model.config)
    config.num_local_experts = len(groups)
    config.num_experts_per_tok = chosen
    result = type(model)(config).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        own = ".experts." in name or name.split(".mlp.")[-1].startswith(("gate.", "router."))
        if own or ".block_sparse_moe.router." in name:
            assert tensor.shape[0] == 6, name
            state[name] = torch.stack([tensor[group].mean(0) for group in groups])
    result.load_state_dict(state)
    return result


@pytest.mark.parametrize(
    ("model_type", "options", "groups"),
    [
        ("mixtral", ["--drop", "1", "4"], [[0], [2], [3], [5]]),
        ("gpt_oss", ["--keep", "5", "0", "2+3"], [[5], [0], [2, 3]]),
        ("granitemoe", ["--merge", "1+4", "0+5"], [[0, 5], [1, 4], [2], [3]]),
        ("deepseek_v3", ["--drop", "0", "5"], [[1], [2], [3], [4]]),
    ],
)
def test_an_edited_mixture_equals_one_edited_by_hand(
    model_type: str, options: list[str], groups: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = edited(mixture(tmp_path / "moe", model_type), groups, 2)
    out = tmp_path / "out"
    assert main(["moe", "edit", str(tmp_path / "moe"), *options, "-o", str(out)]) == 0, capsys.readouterr().err
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert torch.allclose(found.eval()(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert main(["verify", str(out), "-q"]) == 0


def stored(folder: Path, count: int = 4, rows: int = 4, **config: int) -> None:
    tensors = {f"model.layers.{layer}.mlp.gate.weight": torch.arange(rows * 2.0).view(rows, 2) for layer in (0, 1)}
    for layer in (0, 1):
        for number in range(count):
            name = f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight"
            tensors[name] = torch.full((2, 2), 10.0 * layer + number)
    write_checkpoint(folder, tensors, config={"num_experts": count, "num_experts_per_tok": 3, "num_layers": 2} | config)


def test_scores_choose_in_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "moe")
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"0": [0.4, 0.1, 0.2, 0.3], "1": [0, 1, 2, 3]}))
    command = ["moe", "edit", str(tmp_path / "moe"), "--scores", str(scores), "--count", "2"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    result = load_file(tmp_path / "out/model.safetensors")
    first = {name: float(tensor.flatten()[0]) for name, tensor in result.items()}
    assert first == {
        "model.layers.0.mlp.experts.0.up_proj.weight": 0.0, "model.layers.0.mlp.experts.1.up_proj.weight": 3.0,
        "model.layers.1.mlp.experts.0.up_proj.weight": 12.0, "model.layers.1.mlp.experts.1.up_proj.weight": 13.0,
        "model.layers.0.mlp.gate.weight": 0.0, "model.layers.1.mlp.gate.weight": 4.0,
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_experts"] == 2 and config["num_experts_per_tok"] == 2
    assert "num_experts_per_tok 3 -> 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--drop", "4"], 2, "expert 4 of 'model.layers.0.mlp', which has 4 (0-3)"),
        (["--drop", "0", "1", "2", "3"], 2, "no experts are left"),
        (["--keep", "a"], 2, "--keep takes numbers of experts, not 'a'"),
        (["--keep", "1+1"], 2, "experts are different whole numbers"),
        (["--merge", "2"], 2, "one expert alone is no group"),
        (["--merge", "0+1", "1+2"], 2, "expert 1 is named twice"),
        (["--keep", "0", "--experts-per-token", "2"], 2, "2 experts for each token, and 1 are left"),
        (["--keep", "0", "--drop", "1"], 2, "either --keep or --drop"),
        ([], 2, "which experts is not said"),
        (["--scores", "SCORES"], 2, "--scores needs how many experts stay"),
        (["--scores", "SCORES", "--count", "5"], 2, "5 experts are to stay, and the file has 4 scores"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(
    options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path / "moe")
    (tmp_path / "scores").write_text("[1, 2, 3, 4]")
    options = [str(tmp_path / "scores") if word == "SCORES" else word for word in options]
    assert main(["moe", "edit", str(tmp_path / "moe"), *options, "-o", str(tmp_path / "out")]) == code
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dense", "there are no experts by name"),
        ("rows", "has 4 experts, and no router with a row for each"),
        ("groups", "3 experts do not come out even in 2 groups"),
        ("config", "the config says nowhere that there are 4 experts"),
    ],
)
def test_what_is_no_whole_mixture_is_refused(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "dense":
        write_checkpoint(tmp_path / "moe", {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, config={})
    else:
        changes = {"groups": {"n_group": 2}, "config": {"num_experts": 7}}.get(kind, {})
        stored(tmp_path / "moe", rows=3 if kind == "rows" else 4, **changes)
    assert main(["moe", "edit", str(tmp_path / "moe"), "--drop", "0", "-o", str(tmp_path / "out")]) == 4
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()
