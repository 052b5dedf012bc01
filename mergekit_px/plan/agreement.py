"""Whether the inputs of a merge agree: their configs in what the weights mean, and the files beside the weights of the
models whose files are not taken in what they decide."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.sections import TEXT_SECTIONS
from mergekit_px.plan.tokenizers import file_names, side_file

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


_BEHAVIOUR = (
    *("generation_config.json", "tokenizer_config.json", "chat_template*", "*processor_config.json", "*.py"),
    *("*_Pooling/config.json", "config_sentence_transformers.json"),
)
"""Files that decide what a model does with the same weights and tokens: where it stops, how it is asked, what it pools.

Not those that list tokens, whose meaning is compared token by token.
"""
_ASKED_FOR = ("generation_config.json", "chat_template*")
"""Those that a model which lacks them is used without, so that they are missed."""
_INCIDENTAL = frozenset(
    {
        *("transformers_version", "_commit_hash", "_from_model_config", "name_or_path", "_name_or_path"),
        *("tokenizer_class", "tokenizer_file", "processor_class", "added_tokens_decoder", "model_max_length"),
        *("padding_side", "truncation_side", "backend", "is_local", "legacy", "clean_up_tokenization_spaces"),
        *("max_length", "__version__", "extra_special_tokens", "additional_special_tokens"),
    }
)
"""Entries that differ without effect, or say again what is compared elsewhere."""
_NAMED = 3


def differing_files(
    donated: Mapping[str, str],
    donors: set[str],
    inputs: Mapping[str, ResolvedInput],
    used: Iterable[str],
    config_from: str | None = None,
) -> list[str]:
    """One line for each model whose files say something else than those that are taken, or that has more of them.

    Args:
        donated: side file -> the input that gives it.
        donors: the inputs whose config and whose tokenizer are taken.
        used: the inputs that are merged.
        config_from: the input whose config is taken.
    """
    notes: list[str] = []
    if not donors:
        return notes
    for name in used:
        source = inputs[name]
        if source.is_task_vector or source.state is not None:
            continue
        others = [f"{file}{detail}" for file, detail in _differences(donated, inputs, source)]
        if config_from is not None and (ids := _special_ids(inputs[config_from].config, source.config)):
            others.insert(0, f"config.json ({_listed([shown(key) for key in ids])})")
        more = [
            file
            for file in sorted(file_names(source))
            if file not in donated and _like(file, _ASKED_FOR) and name not in donors
        ]
        givers = " and ".join(f"'{donor}'" for donor in sorted(donors - {name}))
        if others:
            notes.append(f"these files say something else in '{name}', and are those of {givers}: {_listed(others)}")
        if more:
            notes.append(f"these files are in '{name}' and not in {givers}, and are not copied: {_listed(more)}")
    return notes


def _differences(
    donated: Mapping[str, str], inputs: Mapping[str, ResolvedInput], source: ResolvedInput
) -> Iterator[tuple[str, str]]:
    """Side file of a model that differs from the one that is taken, and the entries in which it does."""
    own = file_names(source)
    for file, donor in donated.items():
        if donor == source.name or file not in own or not _like(file, _BEHAVIOUR):
            continue
        try:
            stored = [side_file(inputs[donor], file), side_file(source, file)]
        except InputError:  # told by what reads the file for its sake
            continue
        if stored[0] == stored[1]:
            continue
        entries = [_entries(text) for text in stored]
        if entries[0] is None or entries[1] is None:
            yield file, ""
            continue
        keys = [key for key in {**entries[0], **entries[1]} if entries[0].get(key) != entries[1].get(key)]
        if keys:
            yield file, f" ({_listed([shown(key) for key in keys])})"


def _special_ids(taken: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    """The entries for special tokens that two configs both have, and that differ; of the text part too."""
    found: list[str] = []
    parts = [(taken or {}, other or {})]
    parts += [(one, parts[0][1].get(key, {})) for key, one in parts[0][0].items() if isinstance(one, Mapping)]
    for one, two in parts:
        for key in one if isinstance(two, Mapping) else ():
            ids = [_as_list(part.get(key)) for part in (one, two)]
            if key.endswith("_token_id") and all(ids) and ids[0] != ids[1] and key not in found:
                found.append(key)
    return found


def _as_list(value: Any) -> list[Any]:
    """The ids of an entry, one or several, in one order."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return sorted(ids, key=str)


def _entries(text: bytes | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or b"")
    except (ValueError, RecursionError):
        return None
    return {key: value for key, value in found.items() if key not in _INCIDENTAL} if isinstance(found, dict) else None


def _listed(words: list[str]) -> str:
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
