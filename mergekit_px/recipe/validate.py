"""Plain data to a :class:`Recipe`, with pydantic's findings told in plain words and at their place."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.model import ModelInput, Output, Push, Recipe, Rule, Slice, SliceSource, Step
from mergekit_px.recipe.nearest import hint_for
from mergekit_px.recipe.places import Path, Places

_TEXT = "text"
_YES_OR_NO = "true or false"
_LAYERS = "layers: 7, '8-15', [0, 5, 9], '20-' or 'none'"
_PARAMS = "a mapping from parameters to values"
_RULES = "a list of rules"
_NAME = "the name of a model or step"

WANTED: dict[type[BaseModel], dict[str, str]] = {
    Recipe: {
        "pxmerge": "1, the version of the recipe format that this release reads",
        "models": "a mapping from names to models",
        "steps": "a mapping from names to steps",
        "output": "a mapping that says what is written, and where",
        "seed": "a whole number from 0 to 9223372036854775807",
    },
    ModelInput: {
        "model": "a path or a name on the Hub",
        "adapter": "a path or a name on the Hub, or a list of them",
        "keep_tied": _YES_OR_NO,
        "attention_output": "as_trained or once",
        "residual_base": _YES_OR_NO,
        "component": "the name of a part of a pipeline, such as unet",
        "rename": "a mapping of name patterns to name patterns",
    },
    Step: {
        "method": "the name of a merge method",
        "base": _NAME,
        "sources": "a list of names of models or steps, or a mapping from names to weights",
        "params": _PARAMS,
        "like": "the name of a variant such as mergekit",
        "rules": _RULES,
        "slices": "a list of slices",
        "missing": "error, present or base",
        "vocabulary": "error or truncate",
    },
    Rule: {
        "match": "a glob on tensor names, or a list of them",
        "layers": _LAYERS,
        "method": "the name of a merge method",
        "params": _PARAMS,
        "weights": "a mapping from sources to weights, or a list with one weight for each source",
        "take": _NAME,
        "drop": _YES_OR_NO,
    },
    Slice: {
        "sources": "a list of one source or more, each {model: name, layers: range}",
        "base": _NAME,
        "params": _PARAMS,
        "rules": _RULES,
    },
    SliceSource: {
        "model": _NAME,
        "layers": _LAYERS,
        "weight": "a number, or a list of numbers",
        "params": _PARAMS,
    },
    Output: {
        "from": _NAME,
        "path": "a folder",
        "dtype": "a dtype such as bfloat16",
        "shard_size": "a size such as 5GB",
        "config_from": "the name of a model",
        "tokenizer_from": "the name of a model",
        "chat_template": "Jinja text",
        "kind": "model or task_vector",
        "push": "a mapping with the repo to push to",
    },
    Push: {
        "repo": "a repository such as org/name",
        "private": _YES_OR_NO,
        "revision": _TEXT,
    },
}
"""What each field may hold, in words."""

_INSIDE: dict[type[BaseModel], dict[str, tuple[type[BaseModel], bool]]] = {
    Recipe: {"models": (ModelInput, True), "steps": (Step, True), "output": (Output, False)},
    Step: {"rules": (Rule, True), "slices": (Slice, True)},
    Slice: {"sources": (SliceSource, True), "rules": (Rule, True)},
    Output: {"push": (Push, False)},
}
"""Fields that hold other parts of a recipe; True where they hold many, by name or number."""

_ENTRY = {
    Step: "a step such as {method: linear, sources: [a, b]}",
    ModelInput: "a path or {model: path, adapter: path}",
}


def validate_recipe(data: dict[str, Any], places: Places) -> Recipe:
    """Check names of keys and types of values.

    Raises:
        RecipeError: the first thing that is wrong; misspelt keys come first.
    """
    if isinstance(data.get("pxmerge"), (bool, float)):  # equal to 1 for Python, which pydantic follows
        what = f"'pxmerge' must be {WANTED[Recipe]['pxmerge']}, not {shown(data['pxmerge'])}"
        raise RecipeError(what, where=places.value(("pxmerge",)))
    try:
        return Recipe.model_validate(data, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((issue for issue in found if issue["type"] == "extra_forbidden"), found[0])
        raise _in_words(first, data, places) from None


def _in_words(issue: ErrorDetails, data: Any, places: Places) -> RecipeError:
    location: Path = issue["loc"]
    if issue["type"] == "extra_forbidden":
        owner, _, _ = _owner(location)
        known = [*WANTED[owner], "merge"] if owner is Recipe else list(WANTED[owner])
        return unknown_key(str(location[-1]), known, location, places)
    if issue["type"] == "missing":
        path = _existing(location[:-1], data)
        return RecipeError(f"'{_dotted(location)}' is missing", where=places.key(path))
    owner, name, whole = _owner(location)
    path = _existing(location[: whole or len(location)], data)
    wanted = WANTED[owner][name] if name else _ENTRY.get(owner, "a mapping")
    value = _at(path, data)
    hint = (
        "put it in quotes"
        if _is_number(value) and wanted.startswith(("a path", "a folder", _TEXT, "the name"))
        else None
    )
    return RecipeError(f"'{_dotted(path)}' must be {wanted}, not {shown(value)}", where=places.value(path), hint=hint)


def unknown_key(key: str, known: list[str], path: Path, places: Places, what: str = "key") -> RecipeError:
    """The error for a key that nothing reads."""
    inside = f" in '{_dotted(path[:-1])}'" if path[:-1] else ""
    return RecipeError(f"unknown {what} '{key[:80]}'{inside}", where=places.key(path), hint=hint_for(key, known))


def _owner(location: Path) -> tuple[type[BaseModel], str | None, int]:
    """The class and field that a pydantic location is in, and how long the path to that field is.

    The field is None for an entry that should have been of the class itself.
    """
    owner: type[BaseModel] = Recipe
    place = 0
    while place < len(location):
        name = str(location[place])
        if name not in WANTED[owner]:
            break
        inner, many = _INSIDE.get(owner, {}).get(name, (None, False))
        if inner is None or place + 1 == len(location):
            return owner, name, place + 1
        owner = inner
        place += 2 if many else 1
    return owner, None, place


def _existing(path: Path, data: Any) -> Path:
    """The part of a path that the data has (pydantic appends the arms of unions)."""
    for depth, key in enumerate(path):
        known = range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()
        if key not in known:
            return path[:depth]
        data = data[key]
    return path


def _at(path: Path, data: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the recipe"


def shown(value: Any) -> str:
    """A value as an error shows it: as YAML writes it, and short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
