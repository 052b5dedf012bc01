"""The declared merge methods as recipes see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from mergekit_px.declare.fields import fields, of_one_source, problems
from mergekit_px.errors import UsageError
from mergekit_px.methods import Method, find_method, load_methods
from mergekit_px.recipe.catalog import MethodFacts


class DeclaredMethods:
    """A :class:`~mergekit_px.recipe.catalog.MethodCatalog` of all declared methods. Imports no torch."""

    @property
    def methods(self) -> Mapping[str, MethodFacts]:
        return _Facts()

    def validate(self, method: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        declared = find_method(method).params
        try:
            declared.model_validate(dict(params), strict=True)
        except ValidationError as error:
            return [(name, problem) for name, problem in problems(declared, error) if name in params]
        return []


class _Facts(Mapping[str, MethodFacts]):
    """The facts of the methods that there are. Looking one up imports and describes no other."""

    def __getitem__(self, name: str) -> MethodFacts:
        try:
            return facts_of(find_method(name))
        except UsageError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(load_methods())

    def __len__(self) -> int:
        return len(load_methods())


@cache
def method_catalog() -> DeclaredMethods:
    """The catalog that ``load_recipe`` takes as ``methods``."""
    return DeclaredMethods()


@cache
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
