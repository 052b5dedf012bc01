"""The declared merge methods as recipes see them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

from pydantic import ValidationError

from mergekit_px.methods import Method, load_methods
from mergekit_px.recipe.catalog import MethodFacts


class DeclaredMethods:
    """A :class:`~mergekit_px.recipe.catalog.MethodCatalog` of all declared methods. Imports no torch."""

    @cached_property
    def methods(self) -> Mapping[str, MethodFacts]:
        return {name: facts_of(method) for name, method in load_methods().items()}

    def validate(self, method: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        try:
            load_methods()[method].params.model_validate(dict(params), strict=True)
        except ValidationError as error:
            found: dict[str, str] = {}
            for issue in error.errors(include_url=False):
                name = str(issue["loc"][0]) if issue["loc"] else ""
                if name in params:
                    problem = issue["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
                    found.setdefault(name, problem)
            return list(found.items())
        return []


@cache
def method_catalog() -> DeclaredMethods:
    """The catalog that ``load_recipe`` takes as ``methods``."""
    return DeclaredMethods()


def facts_of(method: Method) -> MethodFacts:
    """What a recipe must know of one method."""
    per_source = method.per_source_fields()
    schema = method.params.model_json_schema()
    parameters = {
        name: _of_one_source(_written_out(field, schema.get("$defs", {})), name in per_source)
        for name, field in schema.get("properties", {}).items()
    }
    return MethodFacts(
        name=method.name,
        summary=method.summary,
        parameters=parameters,
        per_source=per_source,
        interpolated=frozenset(name for name, field in parameters.items() if _is_a_number(field)),
        presets=tuple(method.presets),
        sources=method.sources,
        uses_weights=method.uses_weights,
    )


def _written_out(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON Schema with its references replaced by what they refer to."""
    if isinstance(schema, list):
        return [_written_out(inner, definitions) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        return _written_out(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _written_out(inner, definitions) for key, inner in schema.items() if key != "title"}


def _of_one_source(field: Mapping[str, Any], per_source: bool) -> Mapping[str, Any]:
    """The schema of one source's value where a parameter also takes a tuple of them."""
    arms = field.get("anyOf")
    if not per_source or arms is None:
        return field
    arms = [arm for arm in arms if arm.get("type") != "array"]
    rest = {key: value for key, value in field.items() if key != "anyOf"}
    return {**arms[0], **rest} if len(arms) == 1 else {"anyOf": arms, **rest}


def _is_a_number(field: Mapping[str, Any]) -> bool:
    """Whether values in between two values are values too."""
    types = [arm.get("type") for arm in field.get("anyOf", [field])]
    return "number" in types and "array" not in types
