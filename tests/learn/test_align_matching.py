"""What makes a matching: the assignment problem, spectra of heads, and what names and configs tell."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import PlanError
from mergekit_px.learn.align.assignment import best_assignment, is_better
from mergekit_px.learn.align.head_counts import HeadCounts, head_counts
from mergekit_px.learn.align.heads import Heads, match_by_spectrum
from mergekit_px.learn.align.layout import find_layout
from mergekit_px.learn.align.matching import match
from mergekit_px.learn.align.permutations import Attention

ALL = ("heads", "mlp", "residual")

LLAMA = {
    "model.embed_tokens.weight": (30, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (30, 16),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "post_attention_layernorm": (16,),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items()
    },
}


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_assignment_is_the_best_of_all_permutations(size: int) -> None:
    generator = np.random.default_rng(size)
    for products in (generator.normal(size=(size, size)), generator.integers(0, 3, (size, size)).astype(float)):
        best = max(sum(products[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
        found = best_assignment(torch.from_numpy(products))
        assert sorted(found.tolist()) == list(range(size))
        assert sum(products[i, found[i]] for i in range(size)) == pytest.approx(best, rel=1e-12)


def test_of_equal_orders_the_one_that_is_there_stays() -> None:
    products = torch.ones(3, 3, dtype=torch.float64)
    assert not is_better(products, torch.tensor([2, 0, 1]), torch.arange(3))
    products[0, 2] = 2
    assert is_better(products, torch.tensor([2, 0, 1]), torch.arange(3))


@pytest.mark.parametrize("queries", [1, 2])
def test_heads_by_spectrum_against_all_orders(queries: int) -> None:
    """The cheapest of all orders of groups and of query heads in them, from singular values by numpy."""
    generator = torch.Generator().manual_seed(queries)
    groups = 3

    def draw() -> Heads:
        def some(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return Heads(some(groups, queries, 2, 5), some(groups, 2, 5), some(groups, 3, 5), some(groups, queries, 3, 5))

    target, source = draw(), draw()

    def distance(one: Tensor, other: Tensor) -> float:
        values = [np.linalg.svd(matrix.numpy(), compute_uv=False) for matrix in (one, other)]
        return float(np.linalg.norm(values[0] - values[1]))

    def cost(order: tuple[int, ...], chosen: tuple[tuple[int, ...], ...]) -> float:
        total = 0.0
        for i, j in enumerate(order):
            total += distance(target.key[i], source.key[j]) + distance(target.value[i], source.value[j])
            for a, b in enumerate(chosen[i]):
                total += distance(target.query[i, a], source.query[j, b])
                total += distance(target.output[i, a], source.output[j, b])
        return total

    inner = list(itertools.permutations(range(queries)))
    every = itertools.product(itertools.permutations(range(groups)), itertools.product(inner, repeat=groups))
    best = min(cost(order, chosen) for order, chosen in every)
    attention = Attention("x.", groups, queries, 2, 3, False, [], [], [], [])
    found = match_by_spectrum(attention, target, source)
    assert cost(tuple(found.groups.tolist()), tuple(map(tuple, found.queries.tolist()))) == pytest.approx(best)


def test_one_mlp_is_matched_as_well_as_any_order_can() -> None:
    shapes = {"up.weight": (5, 3), "up.bias": (5,), "down.weight": (3, 5)}
    places = (("up", "up"), ("down", "down"))
    layout = find_layout(shapes, HeadCounts(None, None, None), ("mlp",), places, "x")
    generator = torch.Generator().manual_seed(0)
    source, target = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
    )
    found = match(layout, source, target, by="spectrum", inside="joint", rounds=100, seed=0)

    def product(order: tuple[int, ...]) -> float:
        rows = list(order)
        moved = {"up.weight": source["up.weight"][rows], "up.bias": source["up.bias"][rows]}
        moved["down.weight"] = source["down.weight"][:, rows]
        return sum(float(np.sum(target[name].double().numpy() * one.double().numpy())) for name, one in moved.items())

    best = max(product(order) for order in itertools.permutations(range(5)))
    reached = product(tuple(found.permutations.orders["up.weight", 0].tolist()))
    assert reached == pytest.approx(best) and found.stable
    assert found.similarity[1] > found.similarity[0]


def test_a_stranger_in_a_block_keeps_it_in_order() -> None:
    shapes = dict(LLAMA)
    shapes["model.layers.0.self_attn.sinks"] = (4,)
    shapes["model.layers.1.mlp.lookup"] = (24, 2)
    layout = find_layout(shapes, HeadCounts(4, 2, "rotary"), ALL, (), "x")
    assert set(layout.left_alone) == {"model.layers.0.self_attn.", "model.layers.1.mlp."}
    assert "sinks" in layout.left_alone["model.layers.0.self_attn."]
    assert [one.name for one in layout.attention] == ["model.layers.1.self_attn."]
    assert [one.name for one in layout.hidden] == ["model.layers.0.mlp."]
    shapes["model.extra"] = (2, 32)
    with pytest.raises(PlanError, match=r"model\.extra \[2, 32\].*--place"):
        find_layout(shapes, HeadCounts(4, 2, "rotary"), ALL, (), "x")
    assert find_layout(shapes, HeadCounts(4, 2, "rotary"), ("heads", "mlp"), (), "x").width == 0


GPT = {
    "wte.weight": (30, 16),
    "wpe.weight": (9, 16),
    "h.0.ln_1.weight": (16,),
    "h.0.attn.c_attn.weight": (16, 48),
    "h.0.attn.c_attn.bias": (48,),
    "h.0.attn.c_proj.weight": (16, 16),
    "h.0.mlp.c_fc.weight": (16, 24),
    "h.0.mlp.c_fc.bias": (24,),
    "h.0.mlp.c_proj.weight": (24, 16),
}


def test_weights_may_be_the_other_way_round() -> None:
    layout = find_layout(GPT, HeadCounts(4, None, "additive"), ALL, (), "x")
    axes = {(part.tensor, part.axis) for key, part in layout.parts() if key != "residual"}
    assert axes == {
        ("h.0.attn.c_attn.weight", 1),
        ("h.0.attn.c_attn.bias", 0),
        ("h.0.attn.c_proj.weight", 0),
        ("h.0.mlp.c_fc.weight", 1),
        ("h.0.mlp.c_fc.bias", 0),
        ("h.0.mlp.c_proj.weight", 0),
    }
    streams = {(part.tensor, part.axis) for part in layout.residual}
    assert {("h.0.attn.c_attn.weight", 0), ("h.0.attn.c_proj.weight", 1), ("wpe.weight", 1)} <= streams


@pytest.mark.parametrize(
    "names",
    [
        {"c_attn.weight": (48, 16), "c_proj.weight": (16, 16)},
        {"qkv_proj.weight": (48, 16), "out_proj.weight": (16, 16)},
        {"wqkv.weight": (48, 16), "wo.weight": (16, 16)},
        {"query_key_value.weight": (48, 16), "dense.weight": (16, 16)},
    ],
)
def test_an_order_that_names_leave_open_is_not_guessed(names: dict[str, tuple[int, ...]]) -> None:
    shapes = {**LLAMA, **{f"model.layers.2.attn.{name}": shape for name, shape in names.items()}}
    counts = HeadCounts(4, 2, "additive")
    found = find_layout(shapes, counts, ("heads",), (), "x")
    assert [one.name for one in found.attention] == [f"model.layers.{layer}.self_attn." for layer in range(2)]
    fused = next(iter(names)).removesuffix(".weight")
    with pytest.raises(PlanError, match=rf"nothing tells what .*({fused}|{list(names)[1]})"):
        find_layout(shapes, counts, ALL, (), "x")
    with_order = find_layout(shapes, HeadCounts(4, None, "additive"), ("heads",), (("qkv", f"attn.{fused}"),), "x")
    assert len(with_order.attention) == 2  # its projection back is in another block
    placed = find_layout(shapes, HeadCounts(4, None, "additive"), ("heads",), (("qkv", fused),), "x")
    own = next(one for one in placed.attention if one.name == "model.layers.2.attn.")
    assert (own.groups, own.queries, own.channels) == (4, 1, 4)
    assert [int(parts[0].rows[0]) for parts in (own.query, own.key, own.value)] == [0, 16, 32]
    by_head = find_layout(shapes, HeadCounts(4, None, "additive"), ("heads",), (("qkv-by-head", fused),), "x")
    own = next(one for one in by_head.attention if one.name == "model.layers.2.attn.")
    assert [int(parts[0].rows[4]) for parts in (own.query, own.key, own.value)] == [12, 16, 20]


def test_relative_positions_hold_all_heads() -> None:
    """Where one tensor tells heads apart, those of all layers may be meant."""
    shapes = {**LLAMA, "model.relative_attention_bias.weight": (32, 4)}
    with pytest.raises(PlanError, match=r"relative_attention_bias\.weight tells heads apart"):
        find_layout(shapes, HeadCounts(4, 2, "additive"), ("heads",), (), "x")
    with pytest.raises(PlanError, match="ALiBi"):
        find_layout(LLAMA, HeadCounts(4, 2, "alibi"), ("heads",), (), "x")


def test_norms_of_the_stream_inside_attention_are_known_by_their_full_name() -> None:
    """A norm beside the projections may be of heads or of the stream."""
    shapes = {name.replace("self_attn", "attention"): shape for name, shape in LLAMA.items()}
    for name, places, known in (
        ("attention.LayerNorm.gamma", (), True),
        ("attention.inner_norm.weight", (), False),
        ("attention.inner_norm.weight", (("vector", "inner_norm"),), True),
    ):
        found = find_layout({**shapes, f"model.layers.1.{name}": (16,)}, HeadCounts(4, 2, "rotary"), ALL, places, "x")
        assert (found.left_alone == {}) == known and len(found.attention) == 1 + known


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"rope_theta": 1e4}, ["position_embeddings"], "rotary"),
        ({"rope_parameters": {"rope_theta": 1e4}}, [], "rotary"),
        ({"position_embedding_type": "rotary"}, [], "rotary"),
        ({"alibi": True}, ["wpe.weight"], "alibi"),
        ({"alibi": False}, ["wpe.weight"], "additive"),
        ({"position_embedding_type": "absolute"}, ["x"], "additive"),
        ({}, ["encoder.embed_positions.weight"], "additive"),
        ({}, ["layers.0.rotary_emb.inv_freq"], "rotary"),
        ({}, ["x.weight"], None),
    ],
)
def test_what_tells_of_positions(
    config: dict[str, Any], names: list[str], expected: str | None, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(2) for name in names or ["x"]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    assert head_counts(open_checkpoint(tmp_path), None, None, "auto") == HeadCounts(2, None, expected)  # type: ignore[arg-type]
