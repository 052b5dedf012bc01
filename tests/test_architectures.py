"""Tiny models of many architectures go through the command line and come back whole."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

CLASSES = {
    "bert": ("BertForMaskedLM", ""),
    "bloom": ("BloomForCausalLM", ""),
    "cohere": ("CohereForCausalLM", ""),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "experts one by one in 3 of 4 layers"),
    "dots1": ("Dots1ForCausalLM", "experts one by one in 3 of 4 layers"),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", "experts one by one in 3 of 4 layers"),
    "gemma2": ("Gemma2ForCausalLM", ""),
    "gemma3_text": ("Gemma3ForCausalLM", ""),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "experts one by one in 3 of 4 layers"),
    "gpt2": ("GPT2LMHeadModel", ""),
    "gpt_oss": ("GptOssForCausalLM", "experts fused in 4 of 4 layers"),
    "lfm2_moe": ("Lfm2MoeForCausalLM", "experts one by one in 3 of 4 layers"),
    "llama": ("LlamaForCausalLM", ""),
    "mamba2": ("Mamba2ForCausalLM", ""),
    "mixtral": ("MixtralForCausalLM", "experts one by one in 4 of 4 layers"),
    "olmo2": ("Olmo2ForCausalLM", ""),
    "phi3": ("Phi3ForCausalLM", ""),
    "qwen3": ("Qwen3ForCausalLM", ""),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "experts one by one in 4 of 4 layers"),
    "qwen3_next": ("Qwen3NextForCausalLM", "experts one by one in 4 of 4 layers"),
}
"""Model type -> class, and how the class stores its experts."""


@pytest.fixture(scope="module")
def architectures(import_benchmark) -> ModuleType:
    return import_benchmark("architectures")


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_tensor_is_the_mean_and_the_model_reloads(
    architectures: ModuleType, model_type: str, tmp_path: Path
) -> None:
    class_name, experts = CLASSES[model_type]
    outcome = architectures.check(model_type, class_name, tmp_path)
    assert (outcome.verdict, outcome.detail) == ("ok", experts)


def test_a_lost_renamed_or_wrong_tensor_is_noticed(architectures: ModuleType, tmp_path: Path) -> None:
    from mergekit_px.testing import write_checkpoint

    ones = {"a": torch.ones(2), "b": torch.ones(2)}
    for name in ("model0", "model1"):
        write_checkpoint(tmp_path / name, ones)
    for wrong, complaint in (
        ({"a": ones["a"]}, "1 tensors lost: ['b']"),
        ({**ones, "c": torch.ones(2)}, "1 new tensors: ['c']"),
        ({**ones, "b": torch.ones(2, 1)}, "b changed from [2] torch.float32"),
        ({**ones, "b": torch.zeros(2)}, "b is not the mean of the sources"),
    ):
        write_checkpoint(tmp_path / "merged", wrong)
        assert architectures.compare_with_mean(tmp_path) == complaint


def test_stored_experts_are_recognised(architectures: ModuleType) -> None:
    single = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.ones(2, 2)
        for layer in (1, 2)
        for expert in (0, 1)
    }
    dense = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(2, 2),
        "model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(2, 2),
    }
    assert architectures.stored_experts({**dense, **single}) == "experts one by one in 2 of 3 layers"
    fused = {"model.layers.1.mlp.experts.down_proj": torch.ones(2, 2, 2)}
    assert architectures.stored_experts({**dense, **fused}) == "experts fused in 1 of 2 layers"
    assert architectures.stored_experts(dense) == ""
