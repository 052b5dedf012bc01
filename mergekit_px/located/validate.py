"""Plain data to a pydantic model, with pydantic's findings told in plain words and at their place."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a key may hold, in words for messages. ``text`` says that a number there lacks quotes."""

    words: str
    text: bool = False


class Part(BaseModel):
    """Base of everything that is written in a file. Every field is ``Annotated`` with a :class:`Wanted`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True, defer_build=True
    )

    written: ClassVar[Wanted] = Wanted("a mapping")
    """How such a part is written, for an entry that is something else."""
    short_forms: ClassVar[tuple[str, ...]] = ()
    """Keys that are written out before the fields are checked."""


PartType = TypeVar("PartType", bound=Part)


def validate(model: type[PartType], data: dict[str, Any], places: Places, whole: str) -> PartType:
    """Check names of keys and types of values.

    Args:
        whole: what all of it is called, as ``the recipe``.

    Raises:
        RecipeError: the first thing that is wrong; misspelt keys come first.
    """
    try:
        return model.model_validate(data, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        issues = error.errors(include_url=False)
        first = next((issue for issue in issues if issue["type"] == "extra_forbidden"), issues[0])
        raise _in_words(first, model, data, places, whole) from None


def unknown_key(key: str, known: Iterable[str], path: Path, places: Places, kind: str = "key") -> RecipeError:
    """The error for a key that nothing reads."""
    inside = f" in '{dotted(path[:-1])}'" if path[:-1] else ""
    return RecipeError(f"unknown {kind} '{key[:80]}'{inside}", where=places.key(path), hint=hint_for(key, known))


def wanted(model: type[Part], name: str) -> Wanted:
    """What a field may hold, by its name in the file."""
    return next(mark for mark in _fields(model)[name].metadata if isinstance(mark, Wanted))


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


def dotted(path: Path, whole: str = "the recipe") -> str:
    """A key path as ``--set`` takes it."""
    return ".".join(map(str, path)) or whole


def _in_words(issue: ErrorDetails, model: type[Part], data: Any, places: Places, whole: str) -> RecipeError:
    location: Path = issue["loc"]
    owner, name, path = _owner(model, location)
    if issue["type"] == "extra_forbidden":
        return unknown_key(str(location[-1]), [*_fields(owner), *owner.short_forms], location, places)
    if issue["type"] == "missing":
        return RecipeError(f"'{dotted(location)}' is missing", where=places.key(_existing(location[:-1], data)))
    path = _existing(path, data)
    value = data
    for key in path:
        value = value[key]
    field = wanted(owner, name) if name is not None else owner.written
    return RecipeError(
        f"'{dotted(path, whole)}' must be {field.words}, not {shown(value)}",
        where=places.value(path),
        hint="put it in quotes" if field.text and isinstance(value, (int, float)) else None,
    )


def _fields(model: type[Part]) -> dict[str, FieldInfo]:
    """A part's fields by their names in the file."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _owner(model: type[Part], location: Path) -> tuple[type[Part], str | None, Path]:
    """The class and field that a pydantic location is in, and the path to that field.

    The field is None for an entry of a mapping or list that should have been of the class itself.
    """
    owner, place = model, 0
    while place < len(location):
        name = str(location[place])
        field = _fields(owner).get(name)
        if field is None:
            break
        inner, many = _inner(field.annotation)
        end = place + 1
        if inner is None or end == len(location):
            return owner, name, location[:end]
        owner, place = inner, end + many
    return owner, None, location[:place]


def _inner(annotation: Any) -> tuple[type[Part] | None, int]:
    """The part that a field holds, and 1 where it holds several of them."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation, 0
    several = int(typing.get_origin(annotation) in (dict, list))
    for argument in typing.get_args(annotation):
        found, deeper = _inner(argument)
        if found is not None:
            return found, several + deeper
    return None, 0


def _existing(path: Path, data: Any) -> Path:
    """The part of a path that the data has (pydantic appends the arms of unions)."""
    for depth, key in enumerate(path):
        is_entry = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if not is_entry and not (isinstance(data, dict) and key in data):
            return path[:depth]
        data = data[key]
    return path
