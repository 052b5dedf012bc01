"""From values as written to the numbers of one tensor: interpolation over depth, one value for each source."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mergekit_px.declare.fields import problems
from mergekit_px.errors import RecipeError
from mergekit_px.located.validate import shown
from mergekit_px.methods.declare import Method, Params
from mergekit_px.plan.artefacts import Artefacts
from mergekit_px.recipe.model import Value

_LARGEST = 3.4028234663852886e38
"""The largest finite float32."""


def interpolate(values: Sequence[Any], position: float) -> float:
    """Piecewise linear through ``values`` placed evenly over [0, 1].

    Raises:
        ValueError: an empty list, or something that is not a number.
    """
    if not values or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise ValueError(f"a list is interpolated over depth and must hold numbers only, not {list(values)}")
    place = position * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    share = place - below
    return float(values[below]) if share == 0 else float(values[below]) * (1 - share) + float(values[above]) * share


def varies(value: Value) -> bool:
    """Whether a value depends on depth."""
    if isinstance(value, Mapping):
        return any(varies(inner) for inner in value.values())
    return isinstance(value, (list, tuple))


def at_depth(value: Value, position: float) -> Any:
    """A scalar, or the value of a list at that depth."""
    return interpolate(value, position) if isinstance(value, (list, tuple)) else value


def takes_list(method: Method, field: str) -> bool:
    """Whether a parameter is itself a list, which is then not interpolated."""
    info = method.params.model_fields.get(field)
    if info is None or field in method.per_source_fields():
        return False
    annotation = info.annotation
    candidates = typing.get_args(annotation) or (annotation,)
    return any((typing.get_origin(candidate) or candidate) in (list, tuple) for candidate in (annotation, *candidates))


def resolve_params(
    method: Method,
    written: Mapping[str, Value],
    like: str | None,
    sources: Sequence[str],
    position: float,
    where: str,
    artefacts: Artefacts,
) -> Params:
    """The parameter object of one tensor: defaults, then the ``like`` preset, then what was written.

    Args:
        sources: names of the sources that take part, for values given by source.
        position: depth in [0, 1].
        artefacts: reads the files that parameters name.

    Raises:
        RecipeError: a parameter that does not exist, cannot vary, or is out of bounds.
        InputError: a file that a parameter names is missing or is of another kind.
    """
    values: dict[str, Any] = {}
    if like is not None:
        if like not in method.presets:
            known = ", ".join(method.presets) or "none"
            raise RecipeError(f"{method.name} has no variant like '{like}' (known: {known})", where=where)
        values.update(method.presets[like])
    per_source = method.per_source_fields()
    for field, value in written.items():
        if field not in method.params.model_fields:
            raise RecipeError(
                f"{method.name} has no parameter '{field}'",
                where=where,
                hint=f"known are {', '.join(method.params.model_fields) or 'none'}",
            )
        try:
            if field in per_source:
                values[field] = tuple(
                    at_depth(_of_source(method, field, value, source), position) for source in sources
                )
            elif isinstance(value, Mapping):
                raise ValueError("it is one value for all sources")
            elif takes_list(method, field):
                values[field] = value
            else:
                values[field] = at_depth(value, position)
        except KeyError as missing:
            raise RecipeError(f"parameter '{field}' has no value for source {missing}", where=where) from None
        except ValueError as problem:
            raise RecipeError(f"parameter '{field}': {problem}", where=where) from None
    for field, declared in method.artefact_fields().items():
        if isinstance(reference := values.get(field), str):
            values[field] = artefacts.read(declared, reference).content
    for field in per_source - values.keys():
        default = method.params.model_fields[field].get_default()
        if not isinstance(default, tuple) and default is not None:
            values[field] = tuple(default for _ in sources)
    for field in per_source & values.keys():
        if not isinstance(values[field], tuple):
            values[field] = tuple(values[field] for _ in sources)
    try:
        return method.params(**values)
    except ValidationError as error:
        name, breach = problems(method.params, error)[0]
        what = f"'{name}' of {method.name}: {breach}, not {shown(values.get(name))}"
        raise RecipeError(what, where=where) from None


def resolve_weight(value: Value, default: float, position: float, source: str, where: str) -> float:
    """A source's weight for one tensor.

    Raises:
        RecipeError: not a finite number.
    """
    try:
        found = default if value is None else at_depth(value, position)
    except ValueError as problem:
        raise RecipeError(f"weight of '{source}': {problem}", where=where) from None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) <= _LARGEST:
        raise RecipeError(f"the weight of '{source}' must be a finite number (of float32), not {found!r}", where=where)
    return float(found)


def _of_source(method: Method, field: str, value: Value, source: str) -> Value:
    """One source's value: as written, else the method's default where it has one for every source.

    Raises:
        KeyError: there is neither.
    """
    if not isinstance(value, Mapping):
        return value
    default = method.params.model_fields[field].get_default()
    if source not in value and isinstance(default, (int, float)):
        return default
    found: Value = value[source]
    return found
