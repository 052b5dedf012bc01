from __future__ import annotations

import copy
from typing import Any

import pytest

from mergekit_px.errors import PlanError
from mergekit_px.plan.config import check_with_transformers, restack


def restacked(config: dict[str, Any], origin: list[int], count: int = 4) -> dict[str, Any]:
    changed = copy.deepcopy({"num_hidden_layers": count, **config})
    restack(changed, origin, count)
    return changed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["a", "b", "b", "d"]}),
        ({"intermediate_size": [1, 2, 3, 4]}, {"intermediate_size": [1, 2, 2, 4]}),
        ({"no_rope_layers": [0, 1, 1, 1]}, {"no_rope_layers": [0, 1, 1, 1]}),
        ({"hybrid_override_pattern": "M-*E"}, {"hybrid_override_pattern": "M--E"}),
        ({"mlp_only_layers": [1, 3]}, {"mlp_only_layers": [1, 2, 3]}),
        ({"full_attn_idxs": [0, 1, 2, 3]}, {"full_attn_idxs": [0, 1, 2, 3]}),
        ({"moe_layers": [0, 2]}, {"moe_layers": [0]}),
        ({"ple_layer_ids": [2]}, {"ple_layer_ids": [2, 3]}),
        (
            {"per_layer_config": {"01": {"head_dim": 8}, "02": {"head_dim": 4}}},
            {"per_layer_config": {"01": {"head_dim": 8}, "02": {"head_dim": 8}}},
        ),
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 3}),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
            {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
        ),
        ({"moe_layer_end_index": 1}, {"moe_layer_end_index": 2}),
        ({"num_kv_shared_layers": 1}, {"num_kv_shared_layers": 1}),
        ({"num_kv_shared_layers": 2}, {"num_kv_shared_layers": 1}),
        ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "r", "r", "r"]}),
        ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
        ({"eos_token_id": [5, 6, 7, 8]}, {"eos_token_id": [5, 6, 7, 8]}),
        ({"time_step_limit": [0.0, 1.0]}, {"time_step_limit": [0.0, 1.0]}),
    ],
)
def test_what_speaks_of_layers_follows_them(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert restacked(before, [0, 1, 1, 3]) == {"num_hidden_layers": 4, **after}


def test_layers_may_become_more_or_fewer() -> None:
    longer = restacked({"max_window_layers": 4, "layer_types": list("abcd")}, [0, 1, 2, 1, 2, 3])
    assert longer == {"num_hidden_layers": 6, "max_window_layers": 6, "layer_types": list("abcbcd")}
    assert restacked({"first_k_dense_replace": 1}, [2, 3]) == {"num_hidden_layers": 2, "first_k_dense_replace": 0}
    assert restacked({"max_window_layers": 70}, [0, 1]) == {"num_hidden_layers": 2, "max_window_layers": 70}


@pytest.mark.parametrize(
    ("config", "origin"),
    [
        ({"first_k_dense_replace": 1}, [1, 0]),
        ({"num_kv_shared_layers": 1}, [3, 0]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"num_mem_blocks": 1}, [0, 1]),
        ({"sliding_window_pattern": "LG"}, [1, 2, 3]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 1, 1]),
    ],
)
def test_what_cannot_follow_is_refused(config: dict[str, Any], origin: list[int]) -> None:
    with pytest.raises(PlanError, match=next(iter(config))):
        restacked(config, origin)


def test_a_rhythm_that_the_slices_keep_or_a_list_overrules_is_no_problem() -> None:
    assert restacked({"decoder_sparse_step": 2}, [0, 1, 0, 1, 2, 3])["num_hidden_layers"] == 6
    assert restacked({"decoder_sparse_step": 1}, [0, 2])["num_hidden_layers"] == 2
    changed = restacked({"sliding_window_pattern": 2, "layer_types": list("abab")}, [1, 1])
    assert changed["layer_types"] == ["b", "b"]


def test_an_entry_that_is_switched_off_stops_nothing_and_follows() -> None:
    idle = restacked({"max_window_layers": 2, "use_sliding_window": False}, [0, 1, 2, 1, 2, 3])
    assert (idle["num_hidden_layers"], idle["max_window_layers"]) == (6, 3)
    with pytest.raises(PlanError, match="max_window_layers"):
        restacked({"max_window_layers": 2, "use_sliding_window": True}, [0, 1, 2, 1, 2, 3])


def test_a_config_that_counts_no_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="no entry for its 4 layers"):
        restack({"model_type": "x"}, [0], 4)


def test_the_part_that_has_the_layers_is_changed() -> None:
    config = {"text_config": {"num_hidden_layers": 3, "layer_types": list("abc")}, "vision_config": {"depth": 3}}
    restack(config, [0, 0, 2, 2], 3)
    assert config["text_config"] == {"num_hidden_layers": 4, "layer_types": list("aacc")}
    assert config["vision_config"] == {"depth": 3}


def test_a_list_may_be_all_that_counts_the_layers() -> None:
    config = {"layers_block_type": list("abc")}
    restack(config, [0, 2, 2, 2], 3)
    assert config == {"layers_block_type": list("accc")}


def test_kinds_that_transformers_derives_are_written_out_where_they_would_change() -> None:
    config: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    sliding, full = "sliding_attention", "full_attention"
    restack(config, [0, 1, 2, 2, 3, 4, 5], 6)
    assert config["layer_types"] == [sliding, sliding, full, full, sliding, sliding, full]
    unchanged: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    restack(unchanged, [0, 1, 2, 0, 1, 2, 3, 4, 5], 6)
    assert unchanged == {"model_type": "gemma3_text", "num_hidden_layers": 9, "sliding_window_pattern": 3}


def test_kinds_that_transformers_derives_and_nothing_can_say_are_refused() -> None:
    config = {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2}
    with pytest.raises(PlanError, match="cannot say which kinds of layers"):
        restack(config, [0, 2, 2], 4)


def test_numbers_that_json_does_not_have_are_no_reason_to_refuse() -> None:
    config = {
        "model_type": "mamba2",
        "num_hidden_layers": 2,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    restack(config, [0, 1, 1], 2)
    check_with_transformers(config, config)
    assert config["num_hidden_layers"] == 3
    with pytest.raises(PlanError, match="refuses the config"):
        check_with_transformers({**config, "num_hidden_layers": "three"}, config)
    broken = {**config, "num_hidden_layers": "three"}
    check_with_transformers(broken, broken)  # as bad before
