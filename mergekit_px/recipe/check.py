"""Whether a recipe can be meant: its names, its graph, its values, its output."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places
from mergekit_px.located.validate import shown, unknown_key
from mergekit_px.recipe.catalog import MethodCatalog, MethodFacts
from mergekit_px.recipe.chat_template import check_chat_template
from mergekit_px.recipe.check_step import check_step
from mergekit_px.recipe.graph import check_graph, check_reference
from mergekit_px.recipe.model import UNION, Output, Recipe, Rule, Slice, Step, Tokenizer, TokenRow, Value

HIGHEST_SEED = 2**63 - 1

_CODES = ("f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz")
_TORCH_NAMES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_MORE_NAMES = ("float8_e4m3fnuz", "float8_e5m2fnuz", "double", "float", "half", "fp64", "fp32", "fp16")
DTYPES = frozenset((*_CODES, *_TORCH_NAMES, *_MORE_NAMES))
"""Spellings of the dtypes in which merged tensors can be stored."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_SIZE = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?\s*([KMGT]I?)?B|[0-9]{1,18}", re.IGNORECASE)


def check_recipe(recipe: Recipe, places: Places, methods: MethodCatalog | None) -> None:
    """Refuse an invalid recipe. Without ``methods`` their names and parameters are not looked at.

    Raises:
        RecipeError: the first problem, at its place.
    """
    _check_names(recipe, places)
    _check_models(recipe, places)
    for name, step in recipe.steps.items():
        check_step(step, ("steps", name), places)
    check_graph(recipe, places)
    _check_output(recipe, recipe.output, places)
    if recipe.tokenizer is not None:
        _check_tokenizer(recipe, recipe.tokenizer, places)
    if not 0 <= recipe.seed <= HIGHEST_SEED:
        what = f"'seed' must be a whole number from 0 to {HIGHEST_SEED}, not {recipe.seed}"
        raise RecipeError(what, where=places.value(("seed",)))
    if methods is not None:
        check_methods(recipe, places, methods)


def _check_names(recipe: Recipe, places: Places) -> None:
    for part, entries in (("models", recipe.models), ("steps", recipe.steps)):
        if not entries:
            raise RecipeError(f"'{part}' is empty", where=places.key((part,)))
        for name in entries:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"'{name[:80]}' cannot be a name",
                    where=places.key((part, name)),
                    hint="names are letters, digits, '_', '-' and '.', and begin with a letter, a digit or '_'",
                )
    for name in recipe.steps:
        if name in recipe.models:
            where = places.key(("steps", name))
            raise RecipeError(f"step '{name}' has the name of a model", where=where, hint="rename one of them")


def _check_models(recipe: Recipe, places: Places) -> None:
    for name, entry in recipe.models.items():
        adapters = [entry.adapter] if isinstance(entry.adapter, str) else entry.adapter or []
        if entry.model is None and not adapters:
            where = places.key(("models", name))
            raise RecipeError(f"'models.{name}' names neither a model nor an adapter", where=where)
        if entry.model is not None and not entry.model.strip():
            raise RecipeError("a path cannot be empty", where=places.value(("models", name, "model")))
        if not all(adapter.strip() for adapter in adapters):
            raise RecipeError("a path cannot be empty", where=places.value(("models", name, "adapter")))
        if entry.component is not None and not entry.component.strip():
            raise RecipeError("a component cannot be empty", where=places.value(("models", name, "component")))


def _check_output(recipe: Recipe, output: Output, places: Places) -> None:
    if output.from_ is not None:
        check_reference(recipe, output.from_, ("output", "from"), places)
    for key in ("config_from", "tokenizer_from"):
        _check_model(recipe, getattr(output, key), ("output", key), places)
    if not output.path.strip():
        raise RecipeError("'output.path' is empty", where=places.value(("output", "path")))
    if output.dtype is not None and output.dtype.strip().lower().removeprefix("torch.") not in DTYPES:
        raise RecipeError(
            f"merged tensors cannot be stored as '{output.dtype[:80]}'",
            where=places.value(("output", "dtype")),
            hint=hint_for(output.dtype, _TORCH_NAMES),
        )
    if output.chat_template is not None:
        check_chat_template(output.chat_template, places.value(("output", "chat_template")))
    size = str(output.shard_size).strip()
    if not _SIZE.fullmatch(size) or not re.search("[1-9]", size):
        raise RecipeError(
            f"'{size[:80]}' is not a size",
            where=places.value(("output", "shard_size")),
            hint="write one such as 5GB, 512MiB or 1000000",
        )
    if output.push is not None and not output.push.repo.strip():
        raise RecipeError("'output.push.repo' is empty", where=places.value(("output", "push", "repo")))


def _check_tokenizer(recipe: Recipe, tokenizer: Tokenizer, places: Places) -> None:
    if tokenizer.from_ != UNION or UNION in recipe.models:
        _check_model(recipe, tokenizer.from_, ("tokenizer", "from"), places, besides=(UNION,))
    _check_model(recipe, tokenizer.base, ("tokenizer", "base"), places)
    if tokenizer.pad_to is not None and tokenizer.pad_to < 1:
        what = f"'pad_to' must be a whole number from 1 on, not {tokenizer.pad_to}"
        raise RecipeError(what, where=places.value(("tokenizer", "pad_to")), hint="leave it out to keep the rows")
    if recipe.output.tokenizer_from is not None:
        where = places.key(("output", "tokenizer_from"))
        raise RecipeError("either tokenizer or output.tokenizer_from, not both", where=where)
    for token, row in tokenizer.tokens.items():
        path: Path = ("tokenizer", "tokens", token)
        if not token:
            raise RecipeError("a token cannot be empty", where=places.key(path))
        _check_model(recipe, row.model, (*path, "model"), places)
        _check_token_row(token, row, places.key(path))


def _check_token_row(token: str, row: TokenRow, where: str) -> None:
    if row.kind == "model" and row.model is None:
        hint = "write {kind: model, model: name}, or another kind: zero, mean, random"
        raise RecipeError(f"it is not said which model gives the row of '{token[:80]}'", where=where, hint=hint)
    if row.kind in ("zero", "mean") and row.model is not None:
        raise RecipeError(f"'{token[:80]}' is of kind {row.kind}, which takes no model", where=where)
    if (row.token, row.id) != (None, None) and row.kind != "model":
        raise RecipeError(f"'{token[:80]}' is of kind {row.kind}, which takes no row of another token", where=where)
    if row.token is not None and row.id is not None:
        raise RecipeError(f"'{token[:80]}': either token or id, not both", where=where)
    if row.id is not None and row.id < 0:
        raise RecipeError(f"'{token[:80]}': ids begin at 0, and {row.id} is given", where=where)


def _check_model(recipe: Recipe, name: str | None, path: Path, places: Places, besides: tuple[str, ...] = ()) -> None:
    if name is None or name in recipe.models:
        return
    where = places.value(path)
    if name in recipe.steps:
        raise RecipeError(f"'{name}' is a step, and '{path[-1]}' takes a model", where=where)
    kinds = ("zero", "mean", "random")
    hint = f"write {{kind: {name}}}" if name in kinds and path[-1] == "model" else None
    hint = hint or hint_for(name, [*besides, *recipe.models])
    raise RecipeError(f"no model is named '{name[:80]}'", where=where, hint=hint)


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
