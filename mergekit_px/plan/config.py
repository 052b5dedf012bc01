"""The output's config.json, edited as JSON: dtype, layer count and per-layer entries, tying."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_px.errors import PlanError

LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    *("num_decoder_layers", "decoder_layers", "num_blocks"),
)
"""What configs call the number of layers."""
_SUB_CONFIGS = ("text_config", "vision_config", "audio_config", "language_config", "llm_config")

_FIRST_LAYERS = {
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "max_window_layers": 0,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
}
"""Entries that set the layers before a number apart -> what to add to them for that number."""
_SWITCHES = {"max_window_layers": "use_sliding_window"}
"""Entries that say nothing unless another is true."""
_LAST_LAYERS = ("num_kv_shared_layers",)
_PREDICTED_LAYERS = "num_nextn_predict_layers"
_PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "layer_group_size": "layer_types",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "layers_num_experts",
    "moe_layer_freq": "mlp_layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "moe_layer_interval": None,
    "decoder_sparse_step": None,
}
"""Entries by which kinds of layers recur -> the list that counts where the config has it too."""
_CYCLES = ("block_types", "_block_types")
"""Lists that are repeated until all layers have a kind."""
_LAYER_STRINGS = ("hybrid_override_pattern",)
_SHARED_LAYERS = "num_mem_blocks"
"""Where layers share weights and have parts of their own by their place among those that share."""
_LAYER_PROPERTIES = ("layer_types", "layers_block_type", "layers_num_experts", "mlp_layer_types")
_LAYER_NUMBERS = re.compile(r".*(_layers|_layer_ids|_idxs|_indices)")
_COUNTED_FROM_ONE = ("ple_layer_ids",)
_NOT_BY_LAYER = re.compile(r"architectures|time_step_limit|.*_multipliers|.*_token_ids?|no_split_modules|keys_to_.*")


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(config[key] for key in _SUB_CONFIGS if isinstance(config.get(key), dict))]


def update(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change fields, nested as in the file."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            update(config[key], value)
        else:
            config[key] = value


def set_dtype(config: dict[str, Any], dtype: str, *, add: bool = True) -> None:
    """Set the storage dtype under whichever of ``dtype`` and ``torch_dtype`` the config has.

    Args:
        add: say it where the config says nothing; not every library takes an entry that it does not know.
    """
    for part in _parts(config):
        present = [key for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
        for key in present or (["dtype"] if add and part is config else []):
            part[key] = dtype


def untie(config: dict[str, Any]) -> bool:
    """Set ``tie_word_embeddings: false``; whether that changed anything."""
    found = [part for part in _parts(config) if "tie_word_embeddings" in part]
    changed = any(part["tie_word_embeddings"] for part in found) or not found
    for part in found or [config]:
        part["tie_word_embeddings"] = False
    return changed


def tie(config: dict[str, Any]) -> bool:
    """Set ``tie_word_embeddings: true``; whether that changed anything."""
    parts = [part for part in _parts(config) if "tie_word_embeddings" in part] or [config]
    changed = not any(part.get("tie_word_embeddings") for part in parts)
    if changed:
        parts[0]["tie_word_embeddings"] = True
    return changed


def set_vocabulary(config: dict[str, Any], old: int, new: int) -> None:
    """Follow an embedding that has another number of rows."""
    for part in _parts(config):
        for key in ("vocab_size", "vocab_size_per_layer_input"):
            if part.get(key) == old:
                part[key] = new


def restack(config: dict[str, Any], origin: Sequence[int], old_count: int) -> list[str]:
    """Follow layers that were stacked anew.

    What transformers derives from other entries (``layer_types`` from ``sliding_window_pattern``) is compared before
    and after where transformers is installed, and written out where it would come out differently.

    Args:
        origin: for each output layer, the layer of the config's own model that it comes from.
        old_count: number of layers that the config speaks of.

    Returns:
        what was changed, for the plan's notes.

    Raises:
        PlanError: the config says nowhere how many layers there are, or has an entry that cannot follow.
    """
    part = _part_of_layers(config, old_count)
    if _SHARED_LAYERS in part:
        raise PlanError(f"config.json: the layers share weights ({_SHARED_LAYERS}) and cannot be stacked anew")
    before = _derived(config, part, old_count)
    expected = {key: [value[layer] for layer in origin] for key, value in (before or {}).items()}
    changes: dict[str, Any] = {key: len(origin) for key in LAYER_COUNTS if part.get(key) == old_count}
    for key, value in part.items():
        if key in changes:
            continue
        if _is_idle(part, key) and value < old_count:
            changes[key] = sum(layer < value for layer in origin)
        else:
            changes[key] = _followed(key, value, origin, old_count)
    notes = _apply(part, changes)
    if before is None and config.get("model_type") is not None:
        notes.append("config: transformers does not know this model here, so the kinds of layers are not checked")
    for key in _differing(config, part, expected):
        notes += _apply(part, {key: expected[key]})
    if differing := _differing(config, part, expected):
        raise PlanError(
            f"config.json: '{differing[0]}' cannot say which kinds of layers the slices stack",
            hint="stack the layers so that their kinds keep their order",
        )
    for key, instead in _PERIODS.items():
        if instead not in expected and not isinstance(part.get(instead or ""), list):
            _check_period(key, part.get(key), origin)
    return notes


def _part_of_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    for part in _parts(config):
        if any(part.get(key) == count for key in LAYER_COUNTS):
            return part
    for part in _parts(config):
        if any(isinstance(part.get(key), list) and len(part[key]) == count for key in _LAYER_PROPERTIES):
            return part
    raise PlanError(
        f"config.json has no entry for its {count} layers (looked for {', '.join(LAYER_COUNTS)})",
        hint="give another model as output.config_from",
    )


def _apply(part: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    notes = []
    for key, value in changes.items():
        old = part.get(key)
        if old != value:
            part[key] = value
            short = not isinstance(value, list | dict | str)
            notes.append(f"config: {key} {old} -> {value}" if short else f"config: {key} follows the layers")
    return notes


def _followed(key: str, value: Any, origin: Sequence[int], old_count: int) -> Any:
    """The value of an entry after its layers were stacked anew; the same where it does not depend on layers."""
    if isinstance(value, bool) or _NOT_BY_LAYER.fullmatch(key):
        return value
    if isinstance(value, int):
        return _followed_number(key, value, origin, old_count)
    if isinstance(value, dict) and value and "layer" in key and all(str(name).isdecimal() for name in value):
        width = max(len(str(name)) for name in value)
        by_layer = {int(name): inner for name, inner in value.items()}
        return {
            f"{place:0{width}d}": copy.deepcopy(by_layer[layer])
            for place, layer in enumerate(origin)
            if layer in by_layer
        }
    if isinstance(value, list) and value and key in _CYCLES:
        return [copy.deepcopy(value[layer % len(value)]) for layer in origin]
    if isinstance(value, list) and _are_layer_numbers(key, value):
        first = 1 if key in _COUNTED_FROM_ONE else 0
        return [place + first for place, layer in enumerate(origin) if layer + first in value]
    if isinstance(value, list) and len(value) == old_count > 1:
        return [copy.deepcopy(value[layer]) for layer in origin]
    if isinstance(value, str) and key in _LAYER_STRINGS and len(value) == old_count:
        return "".join(value[layer] for layer in origin)
    return value


def _is_idle(part: Mapping[str, Any], key: str) -> bool:
    """Whether an entry is a number that another entry keeps from having an effect."""
    return key in _SWITCHES and part.get(_SWITCHES[key]) is not True and isinstance(part[key], int)


def _followed_number(key: str, value: int, origin: Sequence[int], old_count: int) -> int:
    if key == _PREDICTED_LAYERS:
        return 0
    if key in _FIRST_LAYERS:
        bound = value + _FIRST_LAYERS[key]
        if bound > old_count:
            return max(value, len(origin) - _FIRST_LAYERS[key])
        return _boundary(key, value, [layer < bound for layer in origin]) - _FIRST_LAYERS[key]
    if key in _LAST_LAYERS:
        return len(origin) - _boundary(key, value, [layer < old_count - value for layer in origin])
    return value


def _boundary(key: str, value: int, before: list[bool]) -> int:
    place = before.index(False) if False in before else len(before)
    if any(before[place:]):
        raise PlanError(
            f"config.json: {key}={value} parts the layers in two groups, and the slices mix them",
            hint="order the slices so that layers before and after it stay apart",
        )
    return place


def _are_layer_numbers(key: str, value: list[Any]) -> bool:
    """Whether a list names some layers by number, in order, rather than say something of each."""
    numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    return bool(_LAYER_NUMBERS.fullmatch(key)) and numbers and value == sorted(set(value)) and key != "no_rope_layers"


def _period(value: Any) -> int:
    period = len(value) if isinstance(value, str) else value
    return period if isinstance(period, int) and not isinstance(period, bool) and period > 1 else 1


def _check_period(key: str, value: Any, origin: Sequence[int]) -> None:
    period = _period(value)
    if any(place % period != layer % period for place, layer in enumerate(origin)):
        raise PlanError(
            f"config.json: with {key}={value} kinds of layers recur, and the slices break the rhythm",
            hint="stack whole periods, or install transformers so that the kinds can be written out",
        )


def _differing(config: dict[str, Any], part: dict[str, Any], expected: Mapping[str, list[Any]]) -> list[str]:
    if not expected:
        return []
    found = _derived(config, part, len(next(iter(expected.values())))) or {}
    return [key for key, value in expected.items() if found.get(key) != value]


def _derived(config: Mapping[str, Any], part: Mapping[str, Any], count: int) -> dict[str, list[Any]] | None:
    """What transformers says of each layer, by key; None where it does not know the model, or is not installed."""
    whole = _in_transformers(config)
    if whole is None:
        return None
    key = next((key for key in _SUB_CONFIGS if config.get(key) is part), None)
    read = whole if key is None else getattr(whole, key, None)
    if read is None:
        return None
    fields = {**{key: getattr(read, key, None) for key in _LAYER_PROPERTIES}, **read.to_dict()}
    return {
        key: list(value)
        for key, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == count > 1
        and not _NOT_BY_LAYER.fullmatch(str(key))
        and not _are_layer_numbers(str(key), list(value))
    }


def _in_transformers(config: Mapping[str, Any]) -> Any:
    """The config as an object of transformers, from the JSON alone; None if it refuses or does not know it."""
    with contextlib.suppress(PlanError):
        return _read_by_transformers(config)
    return None


def _read_by_transformers(config: Mapping[str, Any]) -> Any:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        with _silent("transformers"), tempfile.TemporaryDirectory() as folder:
            # From a file, as a model is loaded: numbers that JSON does not have are written in a way of its own.
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            return CONFIG_MAPPING[model_type].from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"transformers refuses the config of the restacked model: {reason}") from None


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config declares; None if it does not."""
    for part in _parts(dict(config)):
        for key in LAYER_COUNTS:
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def layer_kinds(config: Mapping[str, Any], count: int) -> list[str]:
    """For each layer all that the config says of it, as text: equal for layers between which it makes no difference.

    Raises:
        PlanError: the config does not speak of so many layers.
    """
    whole = dict(config)
    part = _part_of_layers(whole, count)
    derived = _derived(whole, part, count) or {}
    periods = [_period(part.get(key)) for key in _PERIODS]
    return [
        repr(
            [
                *(_followed(key, value, [layer], count) for key, value in part.items() if not _is_idle(part, key)),
                *(value[layer] for value in derived.values()),
                *(layer % period for period in periods),
            ]
        )
        for layer in range(count)
    ]


def check_with_transformers(config: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Build the config's class where transformers is installed and knows the type; no remote code.

    Args:
        before: the config that it was made from. Where transformers refuses that too, there is nothing to tell.

    Raises:
        PlanError: transformers refuses the config.
    """
    try:
        _read_by_transformers(config)
    except PlanError:
        if _in_transformers(before) is not None:
            raise
