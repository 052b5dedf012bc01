"""Adapters trained on the spot, merged into the checkpoint's files: the model loaded from the result must compute what
PEFT's model computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_px.cli import main

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


def apply(folder: Path) -> None:
    words = ["adapter", "apply", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / "merged")]
    assert main(words) == 0


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

    assert (
        main(["adapter", "apply", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")])
        == 0
    )

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = merged(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (got - before).abs().max() > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_before_the_training(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(llama(tied))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=LINEAR))
    tokens = torch.randint(0, 44, (3, 12))
    train(adapted, tokens)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens).logits

    apply(tmp_path)

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 44
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=2e-5, rtol=1e-4)


def test_adapters_one_after_the_other(tmp_path: Path) -> None:
    """Norms of the second, DoRA, are of the weights with the first in them, as PEFT merges them in turn."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(llama(False))
    model.save_pretrained(tmp_path / "base")
    tokens = torch.randint(0, 40, (3, 12))
    names = ["first", "second"]
    for name, dora in zip(names, (False, True), strict=True):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=dora, target_modules=LINEAR))
        train(adapted, tokens)
        adapted.save_pretrained(tmp_path / name)
        model = adapted.merge_and_unload()
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
    folders = [str(tmp_path / name) for name in ("base", *names)]
    assert main(["adapter", "apply", *folders, "-o", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=2e-5, rtol=1e-4)
