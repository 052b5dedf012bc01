"""The sections of a multimodal model's config, and its processors, where a part of it is another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_px.errors import TensorMismatchError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import split_layer
from mergekit_px.plan.model import WorkItem

TEXT_SECTIONS = ("text_config", "language_config", "llm_config")
_BETWEEN = ("projector", "merger", "connector")
"""Marks in the names of what joins the parts, and has the width of each."""
_OF_A_FILE = frozenset(
    ("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "vocab_size")
)
"""Entries that are the result's own, whichever model a section is of."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Attributes:
    sections: what configs call its section.
    marks: in the names of its layers; the language model's are those without a mark of another part.
    processors: files of what comes before it.
    """

    sections: tuple[str, ...]
    marks: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()


_PARTS = (
    _Part(("vision_config",), ("vision", "visual"), ("preprocessor_config.json", "video_preprocessor_config.json")),
    _Part(("audio_config",), ("audio",), ("preprocessor_config.json",)),
    _Part(TEXT_SECTIONS),
)


def follow_parts(
    config: dict[str, Any], donor: str, inputs: Mapping[str, ResolvedInput], items: Sequence[WorkItem]
) -> tuple[dict[str, str], list[str]]:
    """Give a part's section of the config the entries of the model that its layers are of.

    Returns:
        Processor files of such models, by name, and what to say.

    Raises:
        TensorMismatchError: what joins the parts is of another width.
    """
    files: dict[str, str] = {}
    notes: list[str] = []
    given = {section for part in _PARTS for section in part.sections if isinstance(config.get(section), Mapping)}
    marks = [mark for part in _PARTS for mark in part.marks if given.intersection(part.sections)]
    for part in _PARTS if given else ():
        key = next((section for section in part.sections if section in given), None)
        layers = [item for item in items if split_layer(item.name) and _belongs(item.name, part, marks)]
        models = list(dict.fromkeys(read.model for item in layers for read in item.reads))
        if key is None or not models or donor in models:
            continue
        source = inputs[models[0]]
        own = _section(source.config or {}, part)
        if own is None:
            notes.append(f"config: {key} is that of '{donor}', and its layers are those of '{models[0]}'")
            continue
        before = config[key]
        config[key] = _followed(before, own)
        notes.append(f"config: {key} is that of '{models[0]}', as its layers are")
        _check_width(before, config[key], models[0], items)
        brought = [name for name in part.processors if name in source.checkpoint.side_files]
        files |= dict.fromkeys(brought, models[0])
    notes += [f"{name} is that of '{model}'" for name, model in files.items()]
    return files, notes


def _belongs(name: str, part: _Part, marks: Sequence[str]) -> bool:
    found = [mark for mark in marks if mark in name.lower()]
    return bool(found) and found[0] in part.marks if part.marks else not found


def _section(config: Mapping[str, Any], part: _Part) -> Mapping[str, Any] | None:
    """The part's section of another model's config; the whole of it where that model is nothing but the part."""
    own = next((config[key] for key in part.sections if isinstance(config.get(key), Mapping)), None)
    others = any(isinstance(config.get(key), Mapping) for each in _PARTS for key in each.sections)
    return own if own is not None or others or not config else config


def _followed(section: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A section as another model's; of another type, which may be one for this place alone, its numbers alone."""
    if section.get("model_type", own.get("model_type")) == own.get("model_type"):
        kept = {key: value for key, value in section.items() if key in _OF_A_FILE}
        return kept | {key: value for key, value in own.items() if key not in _OF_A_FILE}
    numbers = {key: value for key, value in own.items() if type(value) in (int, float, bool)}
    return {**section, **{key: value for key, value in numbers.items() if key not in _OF_A_FILE}}


def _check_width(before: Mapping[str, Any], now: Mapping[str, Any], model: str, items: Sequence[WorkItem]) -> None:
    widths = before.get("hidden_size"), now.get("hidden_size")
    if None in widths or widths[0] == widths[1]:
        return
    for item in items:
        if any(mark in item.name for mark in _BETWEEN) and all(read.model != model for read in item.reads):
            raise TensorMismatchError(
                f"'{model}' is {widths[1]} wide, and '{item.name}' was made for a width of {widths[0]}",
                hint="take a part of the same width, or what joins the parts from the same model",
            )
