"""Tiny random models of the architectures that transformers has.

A tiny config is the type's own default config, sub-configs included, with every size made small that is known by its
name in ``SMALL``; ``OF_TYPE`` says the rest. Mixtures of experts keep experts, dense first layers and every kind of
layer of the original.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

LAYERS = 4
HIDDEN = 32
MOST_PARAMETERS = 6_000_000

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("embedding_dim", "word_embed_proj_dim", "lru_width", "pronunciation_embed_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "intermediate_size_mlp", "mlp_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    "shared_experts_intermediate_size": 24,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "shape_embed_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "pronunciation_vocab_size", "shape_vocab_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "sliding_window": 16,
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    "time_step_rank": 4,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "chunk_size": 8,
    "rank_ratio": 1,
    "image_size": 32,
    "patch_size": 16,
}
"""Sizes for a tiny model; a config takes those of its own fields."""


def _after_first(changes: dict[str, Any]) -> dict[str, Any]:
    """``per_layer_config`` for all layers but the first."""
    return {str(layer): changes for layer in range(1, LAYERS)}


_SHARED_CACHE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size": 96,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", *["full_attention"] * (LAYERS - 1)],
}

OF_TYPE: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "doge": {"is_moe": True},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "per_layer_config": _after_first({"kv_lora_rank": 16}),
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": [48] * LAYERS},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "enable_moe_block": False,
            **_SHARED_CACHE,
            "num_kv_shared_layers": LAYERS,
        }
    },
    "gemma4_text": {"enable_moe_block": True, "per_layer_config": _after_first({"head_dim": 16})},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_SHARED_CACHE}},
    "gemma4_unified_text": {"per_layer_config": _after_first({"head_dim": 16})},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "got_ocr2_vision": {"output_channels": 8, "global_attn_indexes": [1]},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
        "nemo_conv_channels": HIDDEN,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 4,
        "hc_lowrank": 4,
    },
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 8]}
    | {"axial_pos_embds_dim": [8, 24]},
    "xlstm": {"num_blocks": LAYERS},
    "xlnet": {"d_inner": 48, "d_head": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What else the configs (or sub-configs) of a type need to be small."""


def tiny_config(model_type: str, class_name: str) -> Any:
    """The config from which a class makes a tiny model: that of the type, or the part of it that the class takes."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    wanted = getattr(transformers, class_name).config_class
    return _shrunk(wanted if wanted in config_class.sub_configs.values() else config_class)


def _shrunk(config_class: Any) -> Any:
    of_type = OF_TYPE.get(config_class.model_type, {})
    parts = {name: of_type[name] for name in config_class.sub_configs if name in of_type}
    default = config_class(**parts)
    changes = _sizes(default)
    lists = [key for key, value in default.to_dict().items() if isinstance(value, list) and key in changes]
    for left_out in ((), lists):
        with contextlib.suppress(Exception):
            return config_class(**{key: value for key, value in changes.items() if key not in left_out})
    return config_class(**changes)


def _sizes(default: Any) -> dict[str, Any]:
    """The fields to change in a config, as arguments of its class."""
    fields = default.to_dict()
    of_type = OF_TYPE.get(default.model_type, {})
    changes: dict[str, Any] = {
        key: value for key, value in SMALL.items() if key in fields and isinstance(fields[key], int | type(None))
    }
    layers = getattr(default, "num_hidden_layers", None)
    for key, value in fields.items():
        if isinstance(value, list) and layers is not None and layers >= LAYERS and len(value) == layers:
            changes[key] = _kinds(value)
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name not in of_type:
            changes[name] = {"model_type": part.model_type, **_sizes(part)}
    changes["tie_word_embeddings"] = fields.get("tie_word_embeddings", False)
    return {**changes, **of_type}


def _kinds(layers: list[Any]) -> list[Any]:
    """A few layers that show every kind that a longer list has."""
    kinds = [layer for place, layer in enumerate(layers) if layer not in layers[:place]]
    return [kinds[min(place, len(kinds) - 1)] for place in range(LAYERS)]


def tiny_model(model_type: str, class_name: str, seed: int) -> Any:
    """A tiny model with random bfloat16 weights, none of which are all zero or all one.

    Raises:
        ValueError: it would not be tiny, by more than ``MOST_PARAMETERS``.
    """
    import torch
    import transformers

    config = tiny_config(model_type, class_name)
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        count = sum(value.numel() for value in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters when made small")
    torch.manual_seed(seed)
    model = model_class(config)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.02)
    return model.to(torch.bfloat16)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logs, warnings or progress bars: transformers has a lot to say about tiny random models."""
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
