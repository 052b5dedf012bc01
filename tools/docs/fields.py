"""The fields of a pydantic model as rows of a table: name, type with bounds, default, meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from mergekit_px.declare.fields import bounds_of, in_words
from tools.docs.markdown import docstring

_ANYTHING = 5
"""A union of so many types is that of a value that may vary, which a recipe's guide explains once."""

HEADER = ("key", "value", "default", "meaning")


def field_rows(model: type[BaseModel], per_source: frozenset[str] = frozenset()) -> Iterator[tuple[str, str, str, str]]:
    """Rows of ``model``'s fields in the order of declaration; ``per_source`` fields may vary between sources."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    required = schema.get("required", ())
    for (name, entry), field in zip(schema.get("properties", {}).items(), model.model_fields, strict=True):
        if field in per_source:
            forms = [form for form in entry.get("anyOf", [entry]) if form.get("type") != "array"]
            value = f"{value_text({'anyOf': forms}, definitions)}; one, or one for each source"
        else:
            value = value_text(entry, definitions)
        yield f"`{name}`", value, _default(entry, name in required), docstring(str(entry.get("description", "")))


def value_text(entry: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What may be written for a JSON Schema, in words."""
    if "$ref" in entry:
        target = entry["$ref"].rsplit("/", 1)[-1]
        definition = definitions[target]
        return f"[{target}](#{target.lower()})" if "properties" in definition else value_text(definition, definitions)
    if "anyOf" in entry:
        if len(entry["anyOf"]) >= _ANYTHING:
            return "[value](#values)"
        words = (value_text(form, definitions) for form in entry["anyOf"] if form.get("type") != "null")
        return " or ".join(dict.fromkeys(words))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{choice}`" for choice in entry["enum"])
    kind = entry.get("type")
    if kind in ("number", "integer"):
        return f"{kind} {in_words(bounds_of([entry]))}".strip()
    if kind == "array":
        items = dict.fromkeys(value_text(form, definitions) for form in _items(entry))
        return "list of " + " or ".join(items) if any(items) else "list"
    if kind == "object":
        value = entry.get("additionalProperties")
        text = value_text(value, definitions) if isinstance(value, Mapping) else ""
        return f"mapping to {text}" if text else "mapping"
    return {"boolean": "`true`, `false`", "string": "text"}.get(str(kind), "any value")


def _items(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "prefixItems" in entry:
        return list(entry["prefixItems"])
    items = entry.get("items", {})
    return [items] if items else []


def _default(entry: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = entry.get("default")
    if default in (None, {}, []):
        return ""
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"
