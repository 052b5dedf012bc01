"""LoRA, rsLoRA, AdaLoRA and HiRA on linear, embedding, convolution and multi-head attention layers (arXiv 2106.09685,
2312.03732, 2303.10512).

W' = W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA; rank and alpha may differ between modules
(``rank_pattern``, ``alpha_pattern``). The rank is that of the tensors; a configuration that says otherwise is an
error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, BindOptions, only, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.dora import decomposed
from mergekit_px.adapters.experts import bind_experts, is_expert_module
from mergekit_px.adapters.patch import Factors, LowRankPatch, Patch, columns, onto, present
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch


PARAMETERS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag", "lora_E"}
)

_PLAIN_STARTS = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")

_REFUSED_FIELDS = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so it has no merged weight",
    "arrow_config": "an Arrow router chooses adapters for each token, so it has no merged weight",
    "use_qalora": "QA-LoRA pools the inputs of a quantised layer, so it has no merged weight in full precision",
    "kasa_config": "KaSA truncates the base before it is trained, so merging needs that truncated base",
    "use_bdlora": "BD-LoRA stores block-diagonal factors that this program does not read",
    "monteclora_config": "MonteCLoRA samples its weights",
    "layer_replication": "the adapter was trained on replicated layers; replicate them in the base first",
    "enable_lora": "the adapter is of the old grouped kind (enable_lora), which this program does not read",
}

PLAIN_BY_PEFT = "let PEFT make a plain adapter of it (path_initial_model_for_weight_conversion)"

_KNOWN_SWITCHES = {"use_rslora", "use_dora", "velora_config", "loftq_config", "eva_config", "corda_config"} | {
    "lora_ga_config",
    "megatron_config",
    "runtime_config",
}


def check(config: AdapterConfig, options: BindOptions) -> None:
    """Refuse the variants that have no merged weight, or whose weight is relative to another base than the one
    on disk. Raises AdapterError with the reason."""
    for name, reason in _REFUSED_FIELDS.items():
        if config.values.get(name):
            raise config.error(f"cannot be merged: {reason}")
    start = residual_start(config)
    if start is not None and not options.residual_base:
        raise config.error(
            f"cannot be merged into the original base: it was started with {shown(start)}, which changed the base's"
            " weights, and its factors are relative to the residual",
            hint=f"give the residual base, with --residual-base (residual_base: true in a recipe), or {PLAIN_BY_PEFT}",
        )
    unknown = [
        name
        for name, value in config.values.items()
        if value and (name.startswith("use_") or name.endswith("_config"))
        if name not in _KNOWN_SWITCHES and name not in _REFUSED_FIELDS
    ]
    if unknown:
        raise config.error(f"cannot be merged: '{shown(unknown[0])}' is set, which this program does not know")


def residual_start(config: AdapterConfig) -> str | None:
    """How an adapter was started, if that changed the base: its factors are then relative to the residual."""
    start = str(config.values.get("init_lora_weights")).lower()
    return None if start in _PLAIN_STARTS else start


def check_rank(config: AdapterConfig, path: str, rank: int) -> None:
    """Raises AdapterError where the configuration has another rank for a module."""
    stated = config.pattern("rank_pattern", path)
    if stated is None:
        stated = config.number("r", rank)
    if stated != rank:
        raise config.error(f"the rank of {shown(path)} is {rank} in the tensors and {stated:g} in the configuration")


def alpha_of(config: AdapterConfig, path: str, rank: int) -> float:
    """The alpha of a module of this rank for which s = alpha / r, whatever the configuration divides by. Raises
    as ``check_rank``."""
    check_rank(config, path, rank)
    alpha = config.pattern("alpha_pattern", path)
    if alpha is None:
        alpha = config.number("lora_alpha", 8)
    return alpha * math.sqrt(rank) if config.flag("use_rslora") else float(alpha)


def scale_of(config: AdapterConfig, path: str, rank: int) -> float:
    """s for a module of this rank. Raises as ``alpha_of``."""
    return alpha_of(config, path, rank) / rank


def bind(module: Module, binder: Binder) -> list[Patch]:
    """The patches of one module."""
    config = binder.config
    if "lora_diag" in module.tensors:
        raise config.error(f"cannot be merged: {_REFUSED_FIELDS['kasa_config']}")
    if "lora_embedding_A" in module.tensors or "lora_embedding_B" in module.tensors:
        return [_embedding(module, binder)]
    pair = roles(module, config, {"A": "lora_A", "B": "lora_B"}, (2, 5))
    if is_expert_module(module, binder):
        return bind_experts(module, binder, scale_of)
    only(module, config, {"lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"})
    place = binder.names.find(module.name)
    if place is not None and f"{place}.weight" not in binder.base.tensors:
        attention = binder.tensor(f"{place}.in_proj_weight")
        if attention is not None:
            return [low_rank(pair, attention, scale_of(config, module.name, pair["A"].shape[0]), binder)]
    weight = binder.weight(module)
    scale = scale_of(config, pattern_path(module), pair["A"].shape[0])
    patch = low_rank(pair, weight, scale * repeats(module, binder.options), binder)
    patches = [_with_magnitude(module, patch, int(patch.transposed), binder)]
    if "lora_B.bias" in module.tensors:
        patches.append(binder.bias_patch(weight, module.tensors["lora_B.bias"], scale))
    return patches


def low_rank(pair: dict[str, StoredTensor], weight: StoredTensor, scale: float, binder: Binder) -> LowRankPatch:
    """The patch of a linear or convolution layer, once its factors are known to fit the weight: A (r, in, kernel),
    B (out, r, 1, ...). Raises AdapterError otherwise."""
    down, up = pair["A"], pair["B"]
    rank = down.shape[0]
    if len(up.shape) < 2 or up.shape[1] != rank or columns(up.shape) != rank or len(down.shape) < 2:
        raise binder.error(
            f"{shown(down.name)} is {list(down.shape)} and {shown(up.name)} {list(up.shape)}: no product"
        )
    transposed = False
    if len(weight.shape) == 2 and len(down.shape) == 2:
        transposed = binder.orientation(weight, up.shape[0], down.shape[1])
    elif len(down.shape) == len(weight.shape) and weight.shape[0] == up.shape[0] and weight.shape[1] < down.shape[1]:
        raise binder.error(
            f"cannot be merged: {shown(weight.name)} is a grouped convolution", hint="let PEFT merge this adapter"
        )
    else:
        binder.check_shape(weight, (up.shape[0], *down.shape[1:]))
    return LowRankPatch(**onto(weight), factors=pair, scale=scale, rank=rank, transposed=transposed)


def _embedding(module: Module, binder: Binder) -> Patch:
    """E + s (B A)^T: E is (vocabulary, dimension), A (r, vocabulary), B (dimension, r)."""
    pair = roles(module, binder.config, {"A": "lora_embedding_A", "B": "lora_embedding_B"}, (2, 2))
    only(module, binder.config, {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
    scale = scale_of(binder.config, module.name, pair["A"].shape[0])
    return _with_magnitude(module, low_rank_of_embedding(module, pair, scale, binder), 1, binder)


def low_rank_of_embedding(module: Module, pair: dict[str, StoredTensor], scale: float, binder: Binder) -> LowRankPatch:
    """The patch of an embedding, once its factors are known to fit. Raises AdapterError otherwise."""
    weight, rank = binder.weight(module), pair["A"].shape[0]
    if pair["B"].shape[1] != rank:
        raise binder.error(f"the factors of {shown(module.name)} have no product")
    binder.check_shape(weight, (pair["A"].shape[1], pair["B"].shape[0]))
    return LowRankPatch(**onto(weight), factors=pair, scale=scale, rank=rank, transposed=True)


def _with_magnitude(module: Module, patch: LowRankPatch, axis: int, binder: Binder) -> Patch:
    """The patch itself, or its DoRA form where the module has magnitudes or the configuration promises them."""
    if "lora_magnitude_vector" not in module.tensors and not binder.config.flag("use_dora"):
        return patch
    magnitude = roles(module, binder.config, {"magnitude": "lora_magnitude_vector"})["magnitude"]
    return decomposed(patch, magnitude, axis, binder)


def repeats(module: Module, options: BindOptions) -> int:
    """How often the update of a module is added."""
    return 2 if is_attention_output(module) and options.attention_output == "as_trained" else 1


def is_attention_output(module: Module) -> bool:
    """PEFT wraps ``nn.MultiheadAttention`` and, inside it, its out_proj: ``attn.base_layer.out_proj``."""
    return module.path.endswith(".base_layer.out_proj") or module.path == "base_layer.out_proj"


def pattern_path(module: Module) -> str:
    """The path by which a configuration knows a module: the out_proj of an attention has the rank and alpha of the
    whole."""
    return module.name.removesuffix(".out_proj") if is_attention_output(module) else module.name


ADALORA_PARAMETERS = frozenset({"lora_A", "lora_B", "lora_E", "ranknum"})

_EPSILON = 1e-5


def bind_adalora(module: Module, binder: Binder) -> list[Patch]:
    """AdaLoRA: W + s B diag(E) A on linear and 2d convolution layers (arXiv 2303.10512, eq. 3), s = alpha / (r + 1e-5).

    r is ``init_r``: the scaling stays that of the first rank when ranks are pruned, so the tensors' own rank does not
    enter. A convolution's A is (r, in * kernel), flat.
    """
    config = binder.config
    only(module, config, set(ADALORA_PARAMETERS))
    if all(0 in tensor.shape for tensor in module.tensors.values()):
        return []  # pruned away
    factors = roles(module, config, {"A": "lora_A", "B": "lora_B", "E": "lora_E"}, (2, 2))
    weight = binder.weight(module)
    down, up, singular = (factors[role].shape for role in ("A", "B", "E"))
    if len(down) != 2 or up[1:] != down[:1] or singular != (down[0], 1):
        raise config.error(f"the factors of {module.name} have no product")
    transposed = False
    if len(weight.shape) == 2:
        transposed = binder.orientation(weight, up[0], down[1])
    elif (weight.shape[0], columns(weight.shape)) != (up[0], down[1]):
        raise binder.clash(weight, (up[0], down[1]))
    first_rank = config.number("init_r", 12)
    alpha = config.number("lora_alpha", 8)
    return [
        LowRankPatch(
            **onto(weight),
            factors=factors,
            scale=(alpha if alpha > 0 else first_rank) / (first_rank + _EPSILON),
            rank=down[0],
            transposed=transposed,
        )
    ]


HIRA_PARAMETERS = frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"})


@dataclass(frozen=True, kw_only=True, eq=False)
class HiraPatch(Patch):
    """HiRA: W + W * (B A), without a scale, on linear, embedding and convolution layers (Huang et al., ICLR 2025)."""

    inner: LowRankPatch

    @property
    def scratch(self) -> float:
        return 2.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        return block.addcmul(block, self.inner.delta(factors, rows, block))


def bind_hira(module: Module, binder: Binder) -> list[Patch]:
    config = binder.config
    weight = binder.weight(module)
    if "hira_embedding_A" in module.tensors or "hira_embedding_B" in module.tensors:
        pair = roles(module, config, {"A": "hira_embedding_A", "B": "hira_embedding_B"}, (2, 2))
        only(module, config, {"hira_embedding_A", "hira_embedding_B"})
        inner = low_rank_of_embedding(module, pair, 1.0, binder)
    else:
        pair = roles(module, config, {"A": "hira_A", "B": "hira_B"}, (2, 5))
        only(module, config, {"hira_A", "hira_B"})
        inner = low_rank(pair, weight, 1.0, binder)
    check_rank(config, module.name, inner.rank)
    return [HiraPatch(**onto(weight), factors=inner.factors, inner=inner)]
