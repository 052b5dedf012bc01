"""A recipe as tidy YAML: keys in their usual order, defaults left out, what fits in a line on one line."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import Recipe

_WIDTH = 110

_PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./@+~-]*|[0-9]+-[0-9]*")
_READ_OTHERWISE = re.compile(
    r"null|true|false|yes|no|on|off|[yn~]|[-+]?\.(inf|nan)|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?",
    re.IGNORECASE,
)
"""Plain text that some YAML reader takes for something else than text."""
_UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; reading it back gives an equal recipe."""
    data = {"pxmerge": 1, **recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)}
    data["models"] = {
        name: entry["model"] if list(entry) == ["model"] else entry for name, entry in data["models"].items()
    }
    if list(data["steps"]) == ["merge"]:
        data = {("merge" if key == "steps" else key): value for key, value in data.items()}
        data["merge"] = data["merge"]["merge"]
    return "".join(f"{line}\n" for line in _lines(data, 0))


def convert_text(loaded: LoadedRecipe) -> str:
    """What ``pxmerge convert`` prints: the recipe in pxmerge's own form, under every difference in meaning."""
    comments: list[str] = []
    if loaded.dialect == "mergekit":
        comments.append("# Translated from a mergekit config.")
        comments.extend(["# What differs in meaning:"] if loaded.differences else [])
    for difference in loaded.differences:
        comments.extend(
            textwrap.wrap(
                difference,
                _WIDTH,
                initial_indent="# - ",
                subsequent_indent="#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "".join(f"{line}\n" for line in comments) + dump_recipe(loaded.recipe)


def _lines(value: Any, level: int) -> list[str]:
    """Block style, without indentation of its own."""
    lines: list[str] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            label = f"{_text(key)}:"
            if _fits(inner, level + 1, len(label)):
                lines.append(f"{label} {_flow(inner)}")
            else:
                lines.append(label)
                lines.extend(f"  {line}" for line in _lines(inner, level + 1))
        return lines
    for inner in value:
        if _fits(inner, level + 1, 1):
            lines.append(f"- {_flow(inner)}")
        else:
            first, *rest = _lines(inner, level + 1)
            lines.append(f"- {first}")
            lines.extend(f"  {line}" for line in rest)
    return lines


def _fits(value: Any, level: int, used: int) -> bool:
    """Whether a value goes on one line: it is short, and no part of the recipe, no step and no list of rules."""
    if not isinstance(value, (dict, list)) or not value:
        return True
    if level == 1 or _has_mappings(value):
        return False
    if isinstance(value, dict) and "method" in value and value.keys() & {"sources", "slices"}:
        return False
    if isinstance(value, dict) and any(_has_mappings(inner) for inner in value.values()):
        return False
    return 2 * level + used + 1 + len(_flow(value)) <= _WIDTH


def _has_mappings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(inner, dict) for inner in value)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and not _READ_OTHERWISE.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + _UNPRINTABLE.sub(lambda found: f"\\U{ord(found[0]):08X}", escaped) + '"'
