"""Merged models load with transformers and compute what their weights say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mergekit_px.cli import main

TOKENS = (torch.arange(48).reshape(2, 24) * 7) % 96
"""Longer than the sliding windows of the tiny models."""


@pytest.fixture(scope="module")
def tiny(import_benchmark) -> ModuleType:
    return import_benchmark("tiny_models")


def make(tiny: ModuleType, folder: Path, model_type: str, class_name: str, count: int) -> list[Any]:
    """Models saved as ``m0``, ``m1``, ... under a folder."""
    with tiny.quiet():
        models = [tiny.tiny_model(model_type, class_name, seed) for seed in range(count)]
        for number, model in enumerate(models):
            model.save_pretrained(folder / f"m{number}")
    return models


def load(tiny: ModuleType, folder: Path, auto_class: str) -> Any:
    """The model as a user loads it; nothing may be missing, left over or of another shape."""
    with tiny.quiet():
        import transformers

        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert next(model.parameters()).dtype == torch.bfloat16
    return model


def logits(tiny: ModuleType, model: Any) -> torch.Tensor:
    keywords = {} if model.config.model_type == "bert" else {"use_cache": False}
    with tiny.quiet(), torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS, **keywords).logits
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize(
    ("model_type", "class_name", "auto_class"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
    ],
)
def test_a_merged_model_computes_what_the_averaged_weights_compute(
    tiny: ModuleType, tmp_path: Path, model_type: str, class_name: str, auto_class: str
) -> None:
    models = make(tiny, tmp_path, model_type, class_name, 3)
    shares = [0.5, 0.3, 0.2]
    sources = [str(tmp_path / f"m{number}") for number in range(3)]
    weights = [str(share) for share in shares]
    assert main(["linear", "--sources", *sources, "--weights", *weights, "-o", str(tmp_path / "out"), "-q"]) == 0
    merged = load(tiny, tmp_path / "out", auto_class)
    states = [model.state_dict() for model in models]
    averaged = {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True)).to(value.dtype)
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    reference = load(tiny, tmp_path / "m0", auto_class)
    before = logits(tiny, reference)
    reference.load_state_dict(averaged, strict=False)
    found = logits(tiny, merged)
    assert torch.equal(found, logits(tiny, reference))
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("qwen3_next", "Qwen3NextForCausalLM"),
    ],
)
def test_stacked_layers_compute_what_the_same_layers_compute_in_that_order(
    tiny: ModuleType, tmp_path: Path, model_type: str, class_name: str
) -> None:
    """Layers of two models doubled and left out; the reference rearranges the modules of the originals."""
    models = make(tiny, tmp_path, model_type, class_name, 2)
    for order in ([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)], [(0, 1), (1, 3)]):
        out = tmp_path / f"out{len(order)}"
        slices = [
            {"sources": [{"model": str(tmp_path / f"m{model}"), "layer_range": [layer, layer + 1]}]}
            for model, layer in order
        ]
        (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
        assert main(["run", str(tmp_path / "recipe.yml"), "-o", str(out), "-q"]) == 0
        stacked = load(tiny, out, "AutoModelForCausalLM")
        assert torch.equal(logits(tiny, stacked), logits(tiny, rearranged(tiny, tmp_path, models, order)))


def rearranged(tiny: ModuleType, folder: Path, models: list[Any], order: list[tuple[int, int]]) -> Any:
    """The first model with the layers of both in another order, and the head and last norm of the second."""
    first, second = (load(tiny, folder / f"m{number}", "AutoModelForCausalLM") for number in range(len(models)))
    config = first.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for _, layer in order]
    config.num_hidden_layers = len(order)
    layers = torch.nn.ModuleList((first, second)[model].model.layers[layer] for model, layer in order)
    first.model.layers, first.model.norm = layers, second.model.norm
    if not config.tie_word_embeddings:
        first.lm_head = second.lm_head
    return first
