"""The output's config.json, edited as JSON: dtype, layer count and per-layer entries, tying."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_px.errors import PlanError

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")
_LAYER_BOUNDS = ("first_k_dense_replace", "max_window_layers")
_SUB_CONFIGS = ("text_config", "vision_config", "audio_config", "language_config", "llm_config")


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(config[key] for key in _SUB_CONFIGS if isinstance(config.get(key), dict))]


def update(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change fields, nested as in the file."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            update(config[key], value)
        else:
            config[key] = value


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the storage dtype under whichever of ``dtype`` and ``torch_dtype`` the config has."""
    for part in _parts(config):
        present = [key for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
        for key in present or (["dtype"] if part is config else []):
            part[key] = dtype


def untie(config: dict[str, Any]) -> bool:
    """Set ``tie_word_embeddings: false``; whether that changed anything."""
    found = [part for part in _parts(config) if "tie_word_embeddings" in part]
    changed = any(part["tie_word_embeddings"] for part in found) or not found
    for part in found or [config]:
        part["tie_word_embeddings"] = False
    return changed


def set_vocabulary(config: dict[str, Any], old: int, new: int) -> None:
    """Follow an embedding whose rows were cut."""
    for part in _parts(config):
        if part.get("vocab_size") == old:
            part["vocab_size"] = new


def restack(config: dict[str, Any], origin: Sequence[int], old_count: int) -> list[str]:
    """Follow layers that were stacked anew.

    Args:
        origin: for each output layer, the layer of the config's own model that it comes from.
        old_count: number of layers that the config speaks of.

    Returns:
        what was changed, for the plan's notes.

    Raises:
        PlanError: the config says nowhere how many layers there are, or has an entry that cannot follow.
    """
    notes: list[str] = []
    part = next(
        (part for part in _parts(config) for key in _LAYER_COUNTS if part.get(key) == old_count),
        None,
    )
    if part is None:
        raise PlanError(
            f"config.json has no entry for its {old_count} layers (looked for {', '.join(_LAYER_COUNTS)})",
            hint="give another model as output.config_from",
        )
    for key in _LAYER_COUNTS:
        if part.get(key) == old_count:
            part[key] = len(origin)
            notes.append(f"config: {key} {old_count} -> {len(origin)}")
    for key, value in list(part.items()):
        if isinstance(value, list) and len(value) == old_count and old_count > 1:
            part[key] = [copy.deepcopy(value[layer]) for layer in origin]
            notes.append(f"config: {key} follows the layers")
        elif isinstance(value, str) and key.endswith("layers_block_type"):
            raise PlanError(f"config.json: '{key}' cannot follow restacked layers")
    for key in _LAYER_BOUNDS:
        bound = part.get(key)
        if isinstance(bound, int) and not isinstance(bound, bool) and 0 < bound < old_count:
            below = [layer < bound for layer in origin]
            new = below.index(False) if False in below else len(below)
            if any(below[new:]):
                raise PlanError(
                    f"config.json: {key}={bound} parts the layers in two groups, and the slices mix them",
                    hint="order the slices so that layers before and after it stay apart",
                )
            if new != bound:
                part[key] = new
                notes.append(f"config: {key} {bound} -> {new}")
    return notes


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config declares; None if it does not."""
    for part in _parts(dict(config)):
        for key in _LAYER_COUNTS:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def check_with_transformers(config: Mapping[str, Any]) -> None:
    """Build the config's class where transformers is installed and knows the type; no remote code.

    Raises:
        PlanError: transformers refuses the config.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return
    try:
        CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"transformers refuses the config of the restacked model: {reason}") from None
