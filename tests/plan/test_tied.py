from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.tied import is_head, tied_source
from mergekit_px.testing import write_checkpoint


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
