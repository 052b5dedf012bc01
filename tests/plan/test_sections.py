"""A multimodal model of parts of several: sections of its config and its processors follow the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plan_of

from mergekit_px.errors import TensorMismatchError
from mergekit_px.testing import write_checkpoint

LANGUAGE = "language_model."


def layers(prefix: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}layers.{layer}.mlp.fc1.weight": torch.zeros(width, width) for layer in range(2)}


def multimodal(folder: Path, theta: float, eps: float, *, width: int = 4) -> None:
    tensors = layers(LANGUAGE, 8) | layers("vision_tower.", width) | {"projector.weight": torch.zeros(8, width)}
    text = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "rope_theta": theta, "vocab_size": 9}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": width, "layer_norm_eps": eps}
    write_checkpoint(folder, tensors, config={"model_type": "two", "text_config": text, "vision_config": vision})
    (folder / "preprocessor_config.json").write_text(json.dumps({"of": folder.name}))


def beside(folder: Path, rules: list[dict[str, Any]], **output: str) -> Any:
    names = {path.name: str(path) for path in folder.iterdir() if path.is_dir()}
    models: dict[str, Any] = {**names, "llm": {"model": names["llm"], "rename": {"*": f"{LANGUAGE}*"}}}
    step = {"method": "passthrough", "sources": ["one"], "rules": rules}
    return plan_of({"models": models, "merge": step, "output": output}, folder / "out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    multimodal(tmp_path / "one", 1e4, 1e-5)
    multimodal(tmp_path / "two", 2e4, 2e-5)
    multimodal(tmp_path / "wide", 2e4, 2e-5, width=6)
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "rope_theta": 5e5, "vocab_size": 11}
    write_checkpoint(tmp_path / "llm", layers("", 8), config={**config, "architectures": ["Llama"]})
    return tmp_path


def test_sections_and_processors_are_those_of_the_layers(folder: Path) -> None:
    rules = [{"match": "vision_tower.*", "take": "two"}, {"match": f"{LANGUAGE}*", "take": "llm"}]
    plan = beside(folder, rules)
    assert plan.config["model_type"] == "two" and plan.config["vision_config"]["layer_norm_eps"] == 2e-5
    text = plan.config["text_config"]
    assert text["rope_theta"] == 5e5 and text["vocab_size"] == 9 and "architectures" not in text
    assert plan.side_files["preprocessor_config.json"] == "two"
    assert "config: text_config is that of 'llm', as its layers are" in plan.notes
    assert not any("disagree in model_type" in note for note in plan.notes)


def test_what_is_mixed_or_asked_for_stays(folder: Path) -> None:
    one = beside(folder, [{"match": f"{LANGUAGE}layers.0.*", "take": "llm"}])
    two = beside(folder, [{"match": f"{LANGUAGE}*", "take": "llm"}], config_from="one")
    for plan in (one, two):
        assert plan.config["text_config"]["rope_theta"] == 1e4
        assert plan.side_files["preprocessor_config.json"] == "one"


def test_numbers_alone_go_into_a_section_of_a_type_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "one" / "config.json").read_text())
    config["text_config"] |= {"model_type": "two_text", "rope_scaling": {"sections": [1, 2]}}
    (folder / "one" / "config.json").write_text(json.dumps(config))
    text = beside(folder, [{"match": f"{LANGUAGE}*", "take": "llm"}]).config["text_config"]
    assert text["model_type"] == "two_text" and text["rope_scaling"] == {"sections": [1, 2]}
    assert text["rope_theta"] == 5e5


def test_a_part_of_another_width_is_refused_where_the_projector_stays(folder: Path) -> None:
    with pytest.raises(
        TensorMismatchError, match=r"'wide' is 6 wide, and 'projector.weight' was made for a width of 4"
    ):
        beside(folder, [{"match": "vision_tower.*", "take": "wide"}])
    rules = [{"match": ["vision_tower.*", "projector.*"], "take": "wide"}]
    assert beside(folder, rules).config["vision_config"]["hidden_size"] == 6
