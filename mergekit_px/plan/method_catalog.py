"""The declared merge methods as recipes see them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

from pydantic import ValidationError

from mergekit_px.declare.fields import fields, of_one_source, problems
from mergekit_px.methods import Method, load_methods
from mergekit_px.recipe.catalog import MethodFacts


class DeclaredMethods:
    """A :class:`~mergekit_px.recipe.catalog.MethodCatalog` of all declared methods. Imports no torch."""

    @property
    def methods(self) -> Mapping[str, MethodFacts]:
        return _facts(tuple(load_methods()))

    def validate(self, method: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        declared = load_methods()[method].params
        try:
            declared.model_validate(dict(params), strict=True)
        except ValidationError as error:
            return [(name, problem) for name, problem in problems(declared, error) if name in params]
        return []


@lru_cache(maxsize=1)
def _facts(names: tuple[str, ...]) -> Mapping[str, MethodFacts]:
    """The facts of the methods that there are; a plug-in may declare more of them later."""
    return {name: facts_of(load_methods()[name]) for name in names}


@cache
def method_catalog() -> DeclaredMethods:
    """The catalog that ``load_recipe`` takes as ``methods``."""
    return DeclaredMethods()


def facts_of(method: Method) -> MethodFacts:
    """What a recipe must know of one method."""
    per_source = method.per_source_fields()
    parameters = {
        name: of_one_source(entry) if name in per_source else entry for name, entry in fields(method.params).items()
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


def _is_a_number(field: Mapping[str, Any]) -> bool:
    """Whether values in between two values are values too."""
    types = [arm.get("type") for arm in field.get("anyOf", [field])]
    return "number" in types and "array" not in types
