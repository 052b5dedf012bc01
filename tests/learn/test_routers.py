"""Routers of mixtures that are made of prompts, in recipes and in the files of mergekit-moe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.cli import main

WORDS = ["[UNK]", "solve", "for", "x", "write", "code", "a", "poem", "about", "it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with three small models, the first of them, and the tokenizer beside all."""
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    folder = tmp_path_factory.mktemp("models")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, max_position_embeddings=32,
    )  # fmt: skip
    made = []
    for number in range(3):
        torch.manual_seed(number)
        made.append(transformers.LlamaForCausalLM(config).eval())
        made[-1].save_pretrained(folder / f"m{number}")
        tokenizer.save_pretrained(folder / f"m{number}")
    return folder, made[0], tokenizer


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_rows_are_what_the_model_makes_of_the_prompts(mode: str, models: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, tokenizer = models
    prompts = [(["solve for x", "solve it"], ["write a poem"]), (["write code"], [])]
    experts = [
        {"source_model": str(folder / f"m{number}"), "positive_prompts": positive, "negative_prompts": negative}
        for number, (positive, negative) in enumerate(prompts, 1)
    ]
    file = tmp_path / "moe.yaml"
    file.write_text(json.dumps({"base_model": str(folder / "m0"), "gate_mode": mode, "experts": experts}))
    assert main(["moe", "build", str(file), "-o", str(tmp_path / "out"), "-q"]) == 0

    def read(texts: list[str]) -> torch.Tensor:
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        if mode == "cheap_embed":
            rows = model.get_input_embeddings().weight[torch.cat(ids, dim=1)[0]]
            return unit(rows.sum(0)).expand(2, -1)
        states = [torch.stack(model(one, output_hidden_states=True).hidden_states[:-1])[:, 0] for one in ids]
        return torch.stack([one.mean(1) if mode == "hidden_avg" else one[:, -1] for one in states]).mean(0)

    built = load_file(tmp_path / "out/model.safetensors")
    with torch.no_grad():
        for number, (positive, negative) in enumerate(prompts):
            expected = unit(read(positive) - (read(negative) if negative else 0))
            for layer in range(2):
                row = built[f"model.layers.{layer}.block_sparse_moe.gate.weight"][number]
                assert torch.allclose(row, expected[layer], atol=1e-5)


def test_what_prompts_cannot_be_read_by(
    models: tuple[Path, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = models
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / "m0" / name).read_bytes())
    experts = [{"model": "m1", "prompts": ["code"]}, {"model": "m2", "prompts": ["code"]}]
    step = {"method": "passthrough", "sources": ["bare"], "mixture": {"experts": experts, "router": "embedding"}}
    names = {"bare": str(bare), "m1": str(folder / "m1"), "m2": str(folder / "m2")}
    file = tmp_path / "moe.yaml"
    file.write_text(json.dumps({"models": names, "merge": step}))
    out = ["-o", str(tmp_path / "out")]
    assert main(["moe", "build", str(file), *out]) == 3
    error = capsys.readouterr().err
    assert "no tokenizer is beside the model; prompts are read by it" in error and not (tmp_path / "out").exists()
    assert main(["run", str(file), *out]) == 2
    assert "run the recipe by `pxmerge moe build`" in " ".join(capsys.readouterr().err.split())
    names["bare"] = str(folder / "m0")
    file.write_text(json.dumps({"models": names, "merge": step}))
    assert main(["moe", "build", str(file), *out]) == 0
    assert "two experts have almost equal rows in every layer" in " ".join(capsys.readouterr().err.split())
