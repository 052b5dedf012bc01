from __future__ import annotations

from mergekit_px.plan.layers import depth, is_embedding, position, split_layer, stack_sizes


def test_the_first_number_in_a_name_is_the_layer() -> None:
    found = split_layer("model.layers.7.mlp.experts.3.up_proj.weight")
    assert found is not None
    assert (found.stack, found.layer, found.suffix) == ("model.layers.", 7, ".mlp.experts.3.up_proj.weight")
    assert found.renumbered(12) == "model.layers.12.mlp.experts.3.up_proj.weight"


def test_names_without_a_number_are_outside_the_layers() -> None:
    assert split_layer("model.embed_tokens.weight") is None
    assert split_layer("h2o.layer1.weight") is None


def test_each_stack_is_counted_by_itself() -> None:
    names = ["vision.blocks.0.w", "vision.blocks.1.w", "text.layers.0.w", "text.layers.2.experts.9.w", "norm.w"]
    assert stack_sizes(names) == {"vision.blocks.": 2, "text.layers.": 3}


def test_depth_runs_from_the_embedding_to_the_head() -> None:
    sizes = {"layers.": 5}
    assert depth("embed_tokens.weight", sizes) == 0
    assert depth("layers.0.w", sizes) == 0
    assert depth("layers.1.w", sizes) == 0.25
    assert depth("layers.4.w", sizes) == 1
    assert depth("norm.weight", sizes) == 1
    assert depth("lm_head.weight", sizes) == 1
    assert position(0, 1) == 1


def test_embeddings_are_known_by_their_names() -> None:
    assert is_embedding("transformer.wte.weight")
    assert is_embedding("vit.embeddings.cls_token")
    assert not is_embedding("lm_head.weight")
