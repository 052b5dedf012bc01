"""Whether the configs of a merge's inputs agree in what the weights mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_px.errors import PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.sections import TEXT_SECTIONS

_KIND_OF_LAYER, _LABEL = "the kind of layer ", "the label "
"""Before its number; of several the first is told."""
_UNNAMED_LABEL = re.compile(r"LABEL_\d+")
_OTHER_PARTS = ("vision_config", "audio_config")
_MEANING = (
    *("model_type", "position_embedding_type", "partial_rotary_factor"),
    *("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "n_head", "num_heads"),
    *("hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    "tie_word_embeddings",
)
"""Entries that change what equal weights compute. Not among them: dtypes, versions, special ids, dropout, lengths."""


def disagreements(inputs: Mapping[str, ResolvedInput], used: Iterable[str], *, strict: bool) -> list[str]:
    """One line for each entry in which the configs of the models that are merged contradict one another.

    An entry that a config leaves out has the default of its class, which is not known here, and contradicts nothing.

    Raises:
        PlanError: there is one, and ``strict``.
    """
    stated: dict[str, dict[str, Any]] = {}
    for name in used:
        source = inputs[name]
        if source.config is None or source.is_task_vector:
            continue
        for key, value in _meaning(source.config).items():
            stated.setdefault(key, {})[name] = value
    lines: list[str] = []
    for key, values in stated.items():
        first = next(iter(values.values()))
        told = any(key.startswith(kind) and any(kind in line for line in lines) for kind in (_KIND_OF_LAYER, _LABEL))
        if any(value != first for value in values.values()) and not told:
            said = ", ".join(f"{value!r} in '{name}'" for name, value in values.items())
            lines.append(f"the configs disagree in {key}: {said}; the weights of these models do not mean the same")
    if lines and strict:
        raise PlanError(lines[0], hint="merge models of one kind, or leave out --strict")
    return lines


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    text: Mapping[str, Any] = next((config[key] for key in TEXT_SECTIONS if isinstance(config.get(key), Mapping)), {})
    found = _part({**config, **text})
    if text and "model_type" in config:  # with which a language model alone has nothing to agree
        found["model_type of the whole"] = config["model_type"]
    for part in _OTHER_PARTS:
        if isinstance(config.get(part), Mapping):
            found |= {f"{part}.{key}": value for key, value in _part(config[part]).items()}
    return found


def _part(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: config[key] for key in _MEANING if config.get(key) is not None}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        found.setdefault("num_key_value_heads", heads)
        if isinstance(width, int):
            found["head_dim"] = config.get("head_dim") or width // heads
    if "sliding_window" in config:
        found["sliding_window"] = None if config.get("use_sliding_window") is False else config["sliding_window"]
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        found |= {f"{_KIND_OF_LAYER}{number}": kind for number, kind in enumerate(kinds)}
    labels = config.get("id2label")
    if isinstance(labels, Mapping):  # rows of a classifier; those that nobody named contradict nothing
        named = {number: label for number, label in labels.items() if not _UNNAMED_LABEL.fullmatch(str(label))}
        found |= {f"{_LABEL}{number}": label for number, label in named.items()}
    return found | _rope(config)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as ``rope_theta`` and ``rope_scaling``, in whichever of the two spellings they are written."""
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(written, Mapping):
        return {"rope_scaling": written}
    scaling = {key: value for key, value in written.items() if key != "rope_theta" and value is not None}
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    theta = written.get("rope_theta", config.get("rope_theta"))
    found: dict[str, Any] = {}
    if theta is not None:
        found["rope_theta"] = theta
    if theta is not None or written:
        found["rope_scaling"] = scaling
    return found
