"""What the files beside the weights say otherwise in the models whose files are not taken."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.tokenizers import file_names, side_file

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
    donated: Mapping[str, str], donors: set[str], inputs: Mapping[str, ResolvedInput], used: Iterable[str]
) -> list[str]:
    """One line for each model whose files say something else than those that are taken, or that has more of them.

    Args:
        donated: side file -> the input that gives it.
        donors: the inputs whose config and whose tokenizer are taken.
        used: the inputs that are merged.
    """
    notes: list[str] = []
    if not donors:
        return notes
    for name in used:
        source = inputs[name]
        if source.is_task_vector or source.state is not None:
            continue
        others = [f"{file}{detail}" for file, detail in _differences(donated, inputs, source)]
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
