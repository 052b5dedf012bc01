"""Adapters trained on the spot, merged into the checkpoint's files: the model loaded from the result must compute what
PEFT's model computes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.open import open_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}


def llama(tied: bool) -> Any:
    return transformers.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=tied)


def mixtral() -> Any:
    return transformers.MixtralConfig(
        **SIZES, **LLAMA, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
    )


def gpt2() -> Any:
    return transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)


LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (llama(False), lambda: peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")),
    "llama dora": (llama(True), lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEAR)),
    "embedding of a tied llama": (llama(True), lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"])),
    "head of a tied llama": (llama(True), lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])),
    "tokens of a tied llama": (
        llama(True),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    ),
    "saved embedding": (
        llama(False),
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "gpt2": (gpt2(), lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 ia3": (gpt2(), lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "mixtral experts": (
        mixtral(),
        lambda: peft.LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    ),
}


def train(model: Any, tokens: torch.Tensor) -> None:
    """A few steps, large enough to move every tensor."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def apply(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    base = open_checkpoint(base_folder)
    tensors = {name: load_file(base_folder / tensor.file)[name] for name, tensor in base.tensors.items()}
    stored = load_file(adapter_folder / "adapter_model.safetensors")
    binding = open_adapter(adapter_folder).bind(base)
    merged = dict(tensors)
    for target, patch in binding.items():
        factors = {role: stored[tensor.name] for role, tensor in patch.factors.items()}
        merged[target] = patch.merged(None if patch.source is None else tensors[patch.source], factors)
    output.mkdir()
    save_file({name: tensor.clone() for name, tensor in merged.items()}, output / "model.safetensors", {"format": "pt"})
    config = json.loads((base_folder / "config.json").read_text()) | dict(binding.config_updates)
    (output / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_pefts_model_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, adapter = CASES[name]
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokens = torch.randint(0, 40, (3, 12))
    before = model.eval()(input_ids=tokens).logits.detach()
    adapted = peft.get_peft_model(model, adapter())
    train(adapted, tokens)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits

    apply(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = merged(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (got - before).abs().max() > 0.01
