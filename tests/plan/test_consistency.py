"""A config and a tokenizer that contradict the weights are told; with --strict they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_px.errors import PlanError
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint


def notes(folder: Path, config: dict[str, Any], *, ids: int = 60, strict: bool = False) -> tuple[str, ...]:
    models = {"m": ids, "n": 60}
    for name, count in models.items():
        model = write_checkpoint(folder / name, tiny_llama_tensors(seed=1), config=tiny_llama_config() | config)
        vocabulary = {f"t{number}": number for number in range(count)}
        (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    recipe: dict[str, Any] = {"models": {name: str(folder / name) for name in models}}
    recipe["merge"] = {"method": "linear", "sources": [*models]}
    output = {"path": str(folder / "out")}
    return build_plan(recipe_from_mapping(recipe | {"output": output}), PlanOptions(strict=strict)).notes


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers: 5, and the weights have 2 layers"),
        ({"text_config": {"num_hidden_layers": 7}}, "num_hidden_layers: 7"),
        ({"vocab_size": 70}, "vocab_size: 70, and the embedding has 64 rows"),
        ({"hidden_size": 33}, "hidden_size: 33, and the embedding is 32 wide"),
        ({"eos_token_id": [3, 64]}, "eos_token_id: 64, and the embedding has 64 rows"),
        ({"layer_types": ["full_attention"] * 3}, "lists 3 layer_types for 2 layers"),
    ],
)
def test_a_config_of_another_model(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    assert any(told in note for note in notes(tmp_path, config))
    with pytest.raises(PlanError, match=told.split(",")[0].replace("[", r"\[")):
        notes(tmp_path / "strict", config, strict=True)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    assert any("ids up to 64, and the embedding has 64 rows" in note for note in notes(tmp_path, {}, ids=65))


def test_nothing_is_said_of_what_agrees(tmp_path: Path) -> None:
    assert not [note for note in notes(tmp_path, {"num_nextn_predict_layers": 1}, strict=True) if "says" in note]
