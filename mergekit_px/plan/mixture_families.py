"""Kinds of mixtures of experts that dense models are made into: names of their tensors, entries of their configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

DENSE_PARTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a gated MLP, as all models of the Llama kind name them."""

Entry = Callable[[Mapping[str, Any], int, int], Any]
"""A config's entry from (the dense config, number of experts, experts per token)."""


@dataclass(frozen=True)
class Family:
    """One kind of mixture.

    Attributes:
        model_type: as in config.json.
        architecture: its class in transformers.
        dense: model types whose layers are those of this kind but for the MLP.
        module: where the experts are in a layer.
        router: the name of its weight in a layer.
        parts: the names of an expert's gate, up and down matrices; empty where ``fused``.
        fused: the names of the two tensors that hold all experts, gates and ups in the first.
        shared: where the shared expert is in a layer; None for a kind without.
        shared_fused: the names of its two tensors, where gate and up are one.
        shared_gate: what weighs the shared expert, one row.
        correction: a bias of the router for each expert.
        entries: of its config.
        biases: of attention, that its layers may have.
        bias_entry: of its config, which switches them.
    """

    model_type: str
    architecture: str
    dense: tuple[str, ...]
    module: str
    router: str
    entries: Mapping[str, Entry]
    parts: tuple[str, ...] = DENSE_PARTS
    fused: tuple[str, ...] = ()
    shared: str | None = None
    shared_fused: tuple[str, ...] = ()
    shared_gate: str | None = None
    correction: str | None = None
    biases: tuple[str, ...] = ()
    bias_entry: str | None = None
    window_switch: bool = False
    """Whether its config says apart from a window's width if there is one, and in which layers."""
    shared_optional: bool = False
    """Whether it may be without its shared expert."""
    unloaded: bool = False
    """Whether its class is not part of transformers."""


def _width(config: Mapping[str, Any], _count: int, _chosen: int) -> Any:
    return config.get("intermediate_size")


def _count(_config: Mapping[str, Any], count: int, _chosen: int) -> Any:
    return count


def _chosen(_config: Mapping[str, Any], _count: int, chosen: int) -> Any:
    return chosen


def _always(value: Any) -> Entry:
    return lambda _config, _count, _chosen: value


_DEEPSEEK: dict[str, Entry] = {
    "n_routed_experts": _count,
    "num_experts_per_tok": _chosen,
    "n_shared_experts": _always(1),
    "moe_intermediate_size": _width,
    "first_k_dense_replace": _always(0),
    "norm_topk_prob": _always(True),
    "routed_scaling_factor": _always(1.0),
    "n_group": _always(1),
    "topk_group": _always(1),
}
_QWEN: dict[str, Entry] = {
    "num_experts": _count,
    "num_experts_per_tok": _chosen,
    "moe_intermediate_size": _width,
    "decoder_sparse_step": _always(1),
    "mlp_only_layers": _always([]),
    "norm_topk_prob": _always(True),
}
_GRANITE: dict[str, Entry] = {"num_local_experts": _count, "num_experts_per_tok": _chosen}

_deepseek = partial(Family, module="mlp.experts", router="mlp.gate.weight", shared="mlp.shared_experts")
"""Kinds whose layers are DeepSeek's."""

FAMILIES = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        dense=("llama", "mistral"),
        module="block_sparse_moe.experts",
        router="block_sparse_moe.gate.weight",
        parts=("w1", "w3", "w2"),
        entries={"num_local_experts": _count, "num_experts_per_tok": _chosen},
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        dense=("qwen2", "llama", "mistral"),
        module="mlp.experts",
        router="mlp.gate.weight",
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate.weight",
        entries={**_QWEN, "shared_expert_intermediate_size": _width},
        window_switch=True,
        biases=("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        bias_entry="qkv_bias",
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        dense=("qwen3",),
        module="mlp.experts",
        router="mlp.gate.weight",
        entries=_QWEN,
        window_switch=True,
    ),
    _deepseek(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        dense=("qwen3",),
        window_switch=True,
        correction="mlp.gate.e_score_correction_bias",
        entries=_DEEPSEEK,
    ),
    _deepseek(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        dense=("deepseek_v2",),
        entries={**_DEEPSEEK, "topk_method": _always("greedy"), "moe_layer_freq": _always(1)},
    ),
    _deepseek(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        dense=("deepseek_v3",),
        correction="mlp.gate.e_score_correction_bias",
        entries=_DEEPSEEK,
    ),
    Family(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        dense=("granite",),
        module="block_sparse_moe",
        router="block_sparse_moe.router.layer.weight",
        fused=("input_linear.weight", "output_linear.weight"),
        entries=_GRANITE,
    ),
    Family(
        model_type="granitemoeshared",
        architecture="GraniteMoeSharedForCausalLM",
        dense=("granite",),
        module="block_sparse_moe",
        router="block_sparse_moe.router.layer.weight",
        fused=("input_linear.weight", "output_linear.weight"),
        shared="shared_mlp",
        shared_fused=("input_linear.weight", "output_linear.weight"),
        entries={**_GRANITE, "shared_intermediate_size": _width},
    ),
    _deepseek(
        model_type="deepseek",
        architecture="DeepseekForCausalLM",
        dense=("llama",),
        entries={
            **{key: _DEEPSEEK[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")},
            **{key: _DEEPSEEK[key] for key in ("moe_intermediate_size", "first_k_dense_replace", "norm_topk_prob")},
            "moe_layer_freq": _always(1),
            "scoring_func": _always("softmax"),
        },
        shared_optional=True,
        unloaded=True,
    ),
)


_HEADS = "num_attention_heads"
_UNSAID: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        _HEADS: 32,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        _HEADS: 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        _HEADS: 32,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        _HEADS: 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "granite": {"intermediate_size": 11008},
    "deepseek_v2": {"intermediate_size": 11008},
    "deepseek_v3": {"intermediate_size": 18432},
}
"""What transformers takes a dense config to mean where it does not say, and the mixtures made of it otherwise. A name
is that of the entry whose value is taken."""


def config_in_full(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A dense model's config with what its class takes for granted and that of a mixture would take otherwise."""
    found = dict(config)
    for key, value in _UNSAID.get(str(config.get("model_type")), {}).items():
        if key not in found and not (key == "rope_theta" and "rope_parameters" in config):
            found[key] = found[value] if isinstance(value, str) else value
    return found | _attention_windows(found, family)


def _attention_windows(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Which layers attend within a window: all of a Mistral, and of the Qwen kinds only where that is switched on."""
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        return {}
    switched = kind in ("qwen2", "qwen3") and config.get("use_sliding_window")
    window = config.get("sliding_window", 4096) if kind == "mistral" or switched else None
    if window is None and not {"sliding_window", "use_sliding_window"} & config.keys() and kind == "llama":
        return {}
    found: dict[str, Any] = {"sliding_window": window}
    count = config.get("num_hidden_layers")
    if family.window_switch:
        found["use_sliding_window"] = window is not None
    if family.window_switch and window is not None and isinstance(count, int) and "layer_types" not in config:
        full = 0 if kind == "mistral" else config.get("max_window_layers", 28)
        found["layer_types"] = ["full_attention"] * min(full, count) + ["sliding_attention"] * max(count - full, 0)
    return found


def fitting_families(model_type: str, *, shared: bool) -> list[Family]:
    """The kinds of mixtures that models of a type can be made into, the one that is taken unasked first."""
    return [one for one in FAMILIES if model_type in one.dense and (one.shared is not None) is shared]


def family_named(model_type: str) -> Family | None:
    """The kind of mixture of that model type, which may be written with dashes."""
    return next((one for one in FAMILIES if one.model_type == model_type.replace("-", "_").lower()), None)
