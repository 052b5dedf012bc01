from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import plan_of, recipe

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.tied import is_head, tied_copy, tied_source
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint


def model(folder: Path, *names: str, **config: object) -> ResolvedInput:
    tensors = {name: torch.ones(4, 2) for name in names}
    write_checkpoint(folder, tensors, config={"model_type": "x", **config})
    return ResolvedInput("m", str(folder), open_checkpoint(folder))


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "backbone.embeddings.weight"),
        ("lm_head.weight", "transformer.tokens_embed.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
        ("head.weight", "rwkv.embeddings.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("lm_loss.weight", "transformer.word_embedding.weight"),
    ],
)
def test_a_head_that_is_not_stored_is_the_token_embedding(tmp_path: Path, head: str, embedding: str) -> None:
    others = (
        "model.embed_tokens_per_layer.weight",
        "model.vision_embed_tokens.weight",
        "bert.embeddings.position_embeddings.weight",
        "model.layers.0.embed_tokens.weight",
    )
    assert tied_source(head, model(tmp_path / "tied", embedding, *others)) == embedding
    assert tied_source(head, model(tmp_path / "stored", embedding, head)) is None
    assert tied_source(head, model(tmp_path / "untied", embedding, tie_word_embeddings=False)) is None
    assert tied_source(head, model(tmp_path / "two", embedding, f"other.{embedding}")) is None


def test_what_the_config_of_the_text_model_says_of_tying_counts(tmp_path: Path) -> None:
    source = model(tmp_path / "m", "model.embed_tokens.weight", text_config={"tie_word_embeddings": False})
    assert tied_source("lm_head.weight", source) is None


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "lm_head",
        "model.layers.0.decoder.weight",
        "model.layers.1.attention.output.weight",
        "vision.head.weight",
        "model.norm.weight",
    ],
)
def test_other_tensors_are_no_heads(tmp_path: Path, name: str) -> None:
    assert not is_head(name)
    assert tied_source(name, model(tmp_path / "m", "model.embed_tokens.weight")) is None


def tied_models(folder: Path, stored: tuple[bool, bool]) -> None:
    for number, copy in enumerate(stored):
        tensors = tiny_llama_tensors(tied=True, seed=number)
        if copy:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_checkpoint(folder / f"m{number}", tensors, config=tiny_llama_config(tied=True))


@pytest.mark.parametrize("stored", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("step", [{"method": "linear"}, {"method": "slerp", "params": {"t": [0.0, 1.0]}}])
def test_a_redundant_copy_of_a_tied_head_changes_nothing(
    tmp_path: Path, stored: tuple[bool, bool], step: dict[str, object]
) -> None:
    tied_models(tmp_path / "models", stored)
    plan = plan_of(recipe(tmp_path / "models", {**step, "sources": ["m0", "m1"]}), tmp_path / "out")
    assert "lm_head.weight" not in {item.name for item in plan.items}
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is True
    dropped = {(each.input, each.tensor) for each in plan.dropped}
    assert dropped == {(f"m{number}", "lm_head.weight") for number, copy in enumerate(stored) if copy}


def test_a_rule_for_the_head_alone_unties_the_pair_and_the_config_follows(tmp_path: Path) -> None:
    tied_models(tmp_path / "models", (True, True))
    step = {"method": "linear", "sources": ["m0", "m1"], "rules": [{"match": "lm_head*", "take": "m1"}]}
    plan = plan_of(recipe(tmp_path / "models", step), tmp_path / "out")
    assert "lm_head.weight" in {item.name for item in plan.items}
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False
    assert any("untied" in note for note in plan.notes)


def test_a_head_of_another_model_is_no_copy_of_the_embedding(tmp_path: Path) -> None:
    tied_models(tmp_path / "models", (True, True))
    write_checkpoint(tmp_path / "models" / "m1", tiny_llama_tensors(seed=7), config=tiny_llama_config(tied=True))
    step = {"method": "linear", "sources": ["m0", "m1"], "rules": [{"match": "lm_head*", "take": "m1"}]}
    plan = plan_of(recipe(tmp_path / "models", step), tmp_path / "out")
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False


def test_copies_are_known_under_names_that_are_bridged(tmp_path: Path) -> None:
    tied_models(tmp_path / "models", (True, False))
    tensors = {f"module.{name}": value for name, value in tiny_llama_tensors(tied=True, seed=1).items()}
    write_checkpoint(tmp_path / "models" / "m1", tensors, config=tiny_llama_config(tied=True))
    plan = plan_of(recipe(tmp_path / "models", {"method": "linear", "sources": ["m0", "m1"]}), tmp_path / "out")
    assert "lm_head.weight" not in {item.name for item in plan.items}


def test_two_values_under_a_config_that_ties_them_are_two_tensors(tmp_path: Path) -> None:
    for number in range(2):
        tensors = tiny_llama_tensors(seed=number)
        write_checkpoint(tmp_path / "models" / f"m{number}", tensors, config=tiny_llama_config(tied=True))
    plan = plan_of(recipe(tmp_path / "models", {"method": "linear", "sources": ["m0", "m1"]}), tmp_path / "out")
    assert "lm_head.weight" in {item.name for item in plan.items}
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False


def test_other_copies_are_known_by_their_names_and_equal_values(tmp_path: Path) -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    source = model(tmp_path / "t5", *names, tie_word_embeddings=False)
    assert [tied_copy(name, source, source.config) for name in names] == [None, "shared.weight", "shared.weight"]
    apart = {name: torch.full((4, 2), float(number)) for number, name in enumerate(names)}
    write_checkpoint(tmp_path / "apart", apart, config={"model_type": "x"})
    other = ResolvedInput("m", "apart", open_checkpoint(tmp_path / "apart"))
    assert tied_copy(names[1], other, other.config) is None
