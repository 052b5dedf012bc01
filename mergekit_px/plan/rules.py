"""Which rules of a step select a tensor, and what they change of its parameters and weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache

from mergekit_px.errors import RecipeError
from mergekit_px.plan.layers import depth, split_layer
from mergekit_px.recipe.layer_range import parse_layers
from mergekit_px.recipe.model import Rule, Step, Value


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@lru_cache(maxsize=4096)
def _layers(text: str | int | tuple[int, ...]) -> object:
    return parse_layers(list(text) if isinstance(text, tuple) else text)


_ROUNDING = 1e-9
"""How near to an end of a range of depths a layer counts as within; thirds are not exact."""


def selects(rule: Rule, name: str, position: float) -> bool:
    """Whether a rule applies to an output tensor at some depth."""
    if rule.depth is not None and not rule.depth[0] - _ROUNDING <= position <= rule.depth[1] + _ROUNDING:
        return False
    if rule.match is not None and not any(_glob(glob).match(name) for glob in _globs(rule)):
        return False
    if rule.layers is not None:
        selection = _layers(tuple(rule.layers) if isinstance(rule.layers, list) else rule.layers)
        found = split_layer(name)
        return bool(selection.contains(found.layer if found else None))  # type: ignore[attr-defined]
    return True


def _globs(rule: Rule) -> list[str]:
    return [rule.match] if isinstance(rule.match, str) else rule.match or []


def idle_rules(name: str, step: Step, tensors: Collection[str]) -> list[str]:
    """What to say of a step's rules whose globs match none of its tensors."""
    rules = [*step.rules, *(rule for piece in step.slices or () for rule in piece.rules)]
    matches = [_globs(rule) for rule in rules if rule.match is not None]
    idle = [globs for globs in matches if not any(_glob(glob).match(one) for one in tensors for glob in globs)]
    told = [f"the rule for {' or '.join(map(repr, globs))} matches no tensor of step '{name}'" for globs in idle]
    return list(dict.fromkeys(told))


def matching(rules: Sequence[Rule], name: str, position: float) -> tuple[int, ...]:
    """Places of the rules that select a tensor at some depth, in the order in which they apply."""
    return tuple(index for index, rule in enumerate(rules) if selects(rule, name, position))


def rules_outside(rules: Sequence[Rule], name: str, position: float | None) -> list[Rule]:
    """The rules that select a tensor outside the layers; its place follows from its name if it is not given."""
    place = depth(name, {}) if position is None else position
    return [rules[index] for index in matching(rules, name, place)]


def weights_by_rule(rule: Rule, names: list[str], weights: list[Value], where: str) -> list[Value]:
    """The weights of a step's sources where a rule changes them. Raises ``RecipeError`` where they do not fit."""
    if isinstance(rule.weights, Mapping):
        if unknown := rule.weights.keys() - set(names):
            raise RecipeError(f"weights are given for {sorted(unknown)}, which are no sources here", where=where)
        return [rule.weights.get(name, old) for name, old in zip(names, weights, strict=True)]
    assert rule.weights is not None
    if len(rule.weights) != len(names):
        raise RecipeError(f"{len(rule.weights)} weights for {len(names)} sources", where=where)
    return list(rule.weights)


def by_source(value: Value, old: Value, sources: Sequence[str]) -> Value:
    """A rule's value; one given by source changes the sources that it names and leaves the others as they are."""
    if not isinstance(value, Mapping):
        return value
    before = dict(old) if isinstance(old, Mapping) else {} if old is None else dict.fromkeys(sources, old)
    return {**before, **value}
