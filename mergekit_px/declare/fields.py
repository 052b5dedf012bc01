"""Fields of a pydantic class as JSON Schema has them, and their bounds in the words of help, pages and errors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Schema = Mapping[str, Any]

_BOUNDS: Mapping[str, tuple[str, str, Callable[[float, float], bool]]] = {
    "minimum": ("greater_than_equal", "at least", operator.ge),
    "exclusiveMinimum": ("greater_than", "above", operator.gt),
    "maximum": ("less_than_equal", "at most", operator.le),
    "exclusiveMaximum": ("less_than", "below", operator.lt),
}
"""Key of JSON Schema -> what pydantic calls a breach of it, its words, and whether a number keeps it. Lower bounds
come first, as they are said."""

_WORDS = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
}
"""pydantic's type of a finding -> what is said of it, where its own words are about its parser."""


def fields(model: type[BaseModel]) -> dict[str, Schema]:
    """The schema of each field by its name, in order, with every reference replaced by what it refers to."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    return {name: written_out(entry, definitions) for name, entry in schema.get("properties", {}).items()}


def written_out(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON Schema with its references replaced by what they refer to, and without titles."""
    if isinstance(schema, list):
        return [written_out(inner, definitions) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        return written_out(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: written_out(inner, definitions) for key, inner in schema.items() if key != "title"}


def forms(entry: Schema) -> list[Schema]:
    """The forms that a value of a written-out schema may have, null aside."""
    if "anyOf" in entry:
        return [form for part in entry["anyOf"] for form in forms(part)]
    return [] if entry.get("type") == "null" else [entry]


def of_one_source(entry: Schema) -> Schema:
    """The schema of one source's value, where a field also takes a tuple with one value for each."""
    arms = [arm for arm in entry.get("anyOf", ()) if arm.get("type") != "array"]
    if not arms:
        return entry
    rest = {key: value for key, value in entry.items() if key != "anyOf"}
    return {**arms[0], **rest} if len(arms) == 1 else {"anyOf": arms, **rest}


def bounds_of(entries: Iterable[Schema]) -> dict[str, float]:
    """The bounds of numbers, by key of JSON Schema."""
    return {key: float(form[key]) for form in entries for key in _BOUNDS if form.get(key) is not None}


def in_words(bounds: Mapping[str, float]) -> str:
    """``from 0 to 1``, ``above 0 and at most 1``, ``at least 1``; nothing where there are no bounds."""
    if bounds.keys() >= {"minimum", "maximum"}:
        return f"from {bounds['minimum']:g} to {bounds['maximum']:g}"
    return " and ".join(f"{words} {bounds[key]:g}" for key, (_, words, _) in _BOUNDS.items() if key in bounds)


def breach(number: float, bounds: Mapping[str, float]) -> str | None:
    """What is wrong with a number, ``must be from 0 to 1``; None where it keeps its bounds."""
    kept = all(keeps(number, bounds[key]) for key, (_, _, keeps) in _BOUNDS.items() if key in bounds)
    return None if kept else f"must be {in_words(bounds)}"


def problems(model: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """pydantic's findings as (field, what is wrong with it), one for each field."""
    kinds: Sequence[str] = [kind for kind, _, _ in _BOUNDS.values()]
    worded: dict[str, str] = {}
    # Of a field with several forms each one has its finding; a breach says most.
    for issue in sorted(error.errors(include_url=False), key=lambda issue: issue["type"] not in kinds):
        name = str(issue["loc"][0]) if issue["loc"] else ""
        if issue["type"] in kinds:
            problem = f"must be {in_words(bounds_of(_scalars(fields(model)[name])))}"
        else:
            said = _WORDS.get(issue["type"], issue["msg"])
            problem = said.removeprefix("Value error, ").replace("Input should be", "must be")
        worded.setdefault(name, problem)
    return list(worded.items())


def _scalars(entry: Schema) -> list[Schema]:
    """The forms of single values, those inside lists among them."""
    return [inner for form in forms(entry) for inner in (forms(form.get("items", {})) if "items" in form else [form])]
