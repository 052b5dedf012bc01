"""Whether the methods of a recipe exist, take its sources, and have the parameters that it gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places
from mergekit_px.located.validate import shown, unknown_key
from mergekit_px.recipe.catalog import MethodCatalog, MethodFacts
from mergekit_px.recipe.model import Recipe, Rule, Slice, Step, Value


def check_methods(recipe: Recipe, places: Places, methods: MethodCatalog) -> None:
    """Raises RecipeError for the first step or rule that its method does not fit."""
    patterns = frozenset(name for name, entry in recipe.models.items() if entry.may_be_several)
    for name, step in recipe.steps.items():
        _MethodCheck(places, methods, patterns).step(step, ("steps", name))


def find_facts(name: str, methods: MethodCatalog) -> MethodFacts | None:
    """A method by its name, ``task-arithmetic`` or ``task_arithmetic``."""
    return methods.methods.get(name.replace("-", "_"))


class _MethodCheck:
    def __init__(self, places: Places, methods: MethodCatalog, patterns: frozenset[str]) -> None:
        self._patterns = patterns
        self._places = places
        self._methods = methods

    def step(self, step: Step, path: Path) -> None:
        facts = self._facts(step.method, (*path, "method"))
        if step.like is not None and step.like not in facts.presets:
            what = f"{facts.name} has no variant like '{step.like}'"
            hint = hint_for(step.like, facts.presets) or "leave 'like' out"
            raise RecipeError(what, where=self._places.value((*path, "like")), hint=hint)
        # How many models a pattern stands for is known when the files are looked at.
        count = None if step.slices is not None or self._patterns & set(step.source_names()) else len(step.sources)
        if step.slices is None:
            if count is not None:
                self._check_count(facts, count, (*path, "sources"))
            given = step.sources if isinstance(step.sources, dict) else {}
            self._check_unweighted(facts, [(name, given[name]) for name in given], (*path, "sources"))
        self._check_params(facts, step.params, (*path, "params"))
        self._rules(step.rules, facts, count, path)
        for index, piece in enumerate(step.slices or ()):
            self._slice(piece, step, facts, (*path, "slices", index))

    def _slice(self, piece: Slice, step: Step, facts: MethodFacts, path: Path) -> None:
        base = piece.base or step.base
        members = [source for source in piece.sources if source.model != base]
        self._check_count(facts, len(members), (*path, "sources"))
        self._check_params(facts, piece.params, (*path, "params"))
        for index, source in enumerate(piece.sources):
            at = (*path, "sources", index)
            self._check_unweighted(facts, [("weight", source.weight)], at)
            for name in source.params:
                if name in facts.parameters and name not in facts.per_source:
                    what = f"'{name}' of {facts.name} is one value for all sources"
                    raise RecipeError(what, where=self._places.key((*at, "params", name)))
            self._check_params(facts, source.params, (*at, "params"))
        self._rules(piece.rules, facts, len(members), path)

    def _rules(self, rules: Sequence[Rule], facts: MethodFacts, sources: int | None, path: Path) -> None:
        """A rule's parameters are those of its own method, else of the step's or of an earlier rule's."""
        earlier = [facts]
        for index, rule in enumerate(rules):
            at = (*path, "rules", index)
            if rule.method is not None:
                own = self._facts(rule.method, (*at, "method"))
                if sources is not None:
                    self._check_count(own, sources, (*at, "method"))
                self._check_params(own, rule.params, (*at, "params"))
                earlier.append(own)
                continue
            for name in rule.params:
                knows = next((one for one in earlier if name in one.parameters), facts)
                self._check_params(knows, {name: rule.params[name]}, (*at, "params"))

    def _facts(self, name: str, path: Path) -> MethodFacts:
        facts = find_facts(name, self._methods)
        if facts is None:
            hint = hint_for(name, self._methods.methods)
            raise RecipeError(f"unknown merge method '{name[:80]}'", where=self._places.value(path), hint=hint)
        return facts

    def _check_count(self, facts: MethodFacts, count: int, path: Path) -> None:
        least, most = facts.sources
        if count < least or (most is not None and count > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
            )
            plural = "" if wanted.endswith(" 1") else "s"
            what = f"{facts.name} takes {wanted} source{plural} besides the base, and {count} are given"
            raise RecipeError(what, where=self._places.key(path))

    def _check_unweighted(self, facts: MethodFacts, weights: Sequence[tuple[str, Value]], path: Path) -> None:
        for name, weight in weights:
            if weight is not None and not facts.uses_weights:
                where = self._places.key((*path, name))
                raise RecipeError(f"{facts.name} takes no weights", where=where, hint="give the sources as a list")

    def _check_params(self, facts: MethodFacts, params: Mapping[str, Value], path: Path) -> None:
        for name, value in params.items():
            at = (*path, name)
            if name not in facts.parameters:
                raise unknown_key(name, list(facts.parameters), at, self._places, f"{facts.name} parameter")
            if isinstance(value, dict) and name not in facts.per_source:
                what = f"'{name}' of {facts.name} is one value for all sources"
                raise RecipeError(what, where=self._places.value(at))
            for single, at_single in self._singles(facts, name, value, at):
                for _, problem in self._methods.validate(facts.name, {name: single}):
                    what = f"'{name}' of {facts.name}: {problem}, not {shown(single)}"
                    raise RecipeError(what, where=self._places.value(at_single))

    def _singles(self, facts: MethodFacts, name: str, value: Value, path: Path) -> Iterator[tuple[Any, Path]]:
        """The single values that a value as written is made of."""
        if isinstance(value, dict):
            for source, inner in value.items():
                yield from self._singles(facts, name, inner, (*path, source))
        elif isinstance(value, list) and name in facts.interpolated:
            for index, item in enumerate(value):
                if isinstance(item, bool) or not isinstance(item, (int, float)):
                    what = f"a list is interpolated over the layers and holds numbers, not {shown(item)}"
                    raise RecipeError(what, where=self._places.value((*path, index)))
                yield item, (*path, index)
        else:
            yield value, path
