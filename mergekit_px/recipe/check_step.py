"""Whether one step can be meant, its rules and slices included; nothing is known of its method here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places
from mergekit_px.located.validate import shown
from mergekit_px.recipe.layer_range import parse_layers
from mergekit_px.recipe.mixture import FROM_PROMPTS, Expert, ExpertChoice, Mixture, group_of
from mergekit_px.recipe.model import Rule, Slice, SliceSource, Step, Value


def check_step(step: Step, path: Path, places: Places) -> None:
    """Raises RecipeError for the first invalid thing."""
    names = step.source_names()
    if step.slices is not None:
        if names:
            raise RecipeError("a step has either sources or slices", where=places.key((*path, "slices")))
        if not step.slices:
            raise RecipeError("'slices' is empty", where=places.key((*path, "slices")))
        names = list(dict.fromkeys(source.model for piece in step.slices for source in piece.sources))
    elif not names:
        where = places.key((*path, "sources"))
        raise RecipeError(f"step '{path[-1]}' has no sources", where=where, hint="write sources: [a, b]")
    for index, name in enumerate(names):
        if name in names[:index]:
            where = places.key((*path, "sources", index))
            raise RecipeError(f"source '{name}' is given twice", where=where, hint="give it a larger weight instead")
    if isinstance(step.sources, dict):
        for name, weight in step.sources.items():
            _check_weight(weight, (*path, "sources", name), places)
    _check_params(step.params, names, (*path, "params"), places)
    _check_rules(step.rules, names, path, places)
    for index, piece in enumerate(step.slices or ()):
        _check_slice(piece, (*path, "slices", index), places)
    if step.mixture is not None:
        _check_mixture(step.mixture, (*path, "mixture"), places)
    if step.experts is not None:
        _check_choice(step.experts, (*path, "experts"), places)


def _check_choice(choice: ExpertChoice, path: Path, places: Places) -> None:
    lists: list[tuple[Path, list[Any]]] = [(("layers", layer), entries) for layer, entries in choice.layers.items()]
    for layer in choice.layers:
        if not (layer.isascii() and layer.isdecimal()):
            raise RecipeError(f"'{layer[:80]}' is no number of a layer", where=places.key((*path, "layers", layer)))
    instead = [key for key in ("drop", "merge") if getattr(choice, key)]
    if instead and (choice.keep or lists):
        what = f"either '{instead[0]}' or the experts that are kept"
        raise RecipeError(what, where=places.key((*path, instead[0])))
    if choice.keep or not (lists or instead):
        lists.insert(0, (("keep",), choice.keep))
    _check_groups(choice, path, places)
    for keys, entries in lists:
        if not entries:
            raise RecipeError("no experts are kept", where=places.key((*path, *keys)), hint="write keep: [0, 1]")
        if len(entries) != len(lists[0][1]):
            what = f"{len(entries)} experts here and {len(lists[0][1])} elsewhere, and all layers must have as many"
            raise RecipeError(what, where=places.key((*path, *keys)))
        _check_entries(entries, (*path, *keys), places)
    if choice.experts_per_token is not None and choice.experts_per_token < 1:
        what = f"'experts_per_token' must be a whole number from 1 on, not {choice.experts_per_token}"
        raise RecipeError(what, where=places.value((*path, "experts_per_token")))


def _check_groups(choice: ExpertChoice, path: Path, places: Places) -> None:
    """What is merged and what is dropped, apart from one another."""
    _check_entries(choice.drop, (*path, "drop"), places)
    _check_entries(choice.merge, (*path, "merge"), places)
    seen: set[int] = set(choice.drop)
    for index, entry in enumerate(choice.merge):
        numbers = {number for number, _ in group_of(entry)}
        if numbers & seen or len(numbers) < 2:
            told = f"expert {min(numbers & seen)} is named twice" if numbers & seen else "one expert alone is no group"
            raise RecipeError(told, where=places.key((*path, "merge", index)))
        seen |= numbers


def _check_entries(entries: Sequence[Any], path: Path, places: Places) -> None:
    for index, entry in enumerate(entries):
        try:
            group_of(entry)
        except ValueError as error:
            what = f"{error}, not {shown(entry)}"
            raise RecipeError(what, where=places.key((*path, index))) from None


def _check_mixture(mixture: Mixture, path: Path, places: Places) -> None:
    if not mixture.experts:
        raise RecipeError("a mixture without experts", where=places.value((*path, "experts")), hint="name two or more")
    if mixture.experts_per_token < 1:
        what = f"'experts_per_token' must be a whole number from 1 on, not {mixture.experts_per_token}"
        raise RecipeError(what, where=places.value((*path, "experts_per_token")))
    experts: list[tuple[Path, Expert]] = [(("experts", index), one) for index, one in enumerate(mixture.experts)]
    experts += [(("shared",), mixture.shared)] if mixture.shared is not None else []
    for keys, expert in experts:
        if not (math.isfinite(expert.noise) and expert.noise >= 0):
            what = f"'noise' must be a finite number from 0 on, not {shown(expert.noise)}"
            raise RecipeError(what, where=places.value((*path, *keys, "noise")))
        if not math.isfinite(expert.scale):
            what = f"'scale' must be a finite number, not {shown(expert.scale)}"
            raise RecipeError(what, where=places.value((*path, *keys, "scale")))
        for name, texts in (("prompts", expert.prompts), ("negative_prompts", expert.negative_prompts)):
            blank = next((index for index, text in enumerate(texts) if not text.strip()), None)
            if blank is not None:
                raise RecipeError("a prompt cannot be empty", where=places.value((*path, *keys, name, blank)))
    router = mixture.router
    if router.scale is not None and not (math.isfinite(router.scale) and router.scale > 0):
        what = f"'scale' must be a finite number above 0, not {shown(router.scale)}"
        raise RecipeError(what, where=places.value((*path, "router", "scale")))
    if (router.kind == "file") != (router.model is not None):
        what = f"a router of kind {router.kind} takes no model" if router.model else "it is not said which file"
        hint = "write router: {kind: file, model: NAME}, and name the file under models"
        raise RecipeError(what, where=places.key((*path, "router")), hint=hint)
    if router.kind in FROM_PROMPTS:
        lacking = next((keys for keys, expert in experts if not expert.prompts and keys != ("shared",)), None)
        if lacking is not None:
            what = f"a router of kind {router.kind} is made of prompts, and this expert has none"
            raise RecipeError(what, where=places.value((*path, *lacking)), hint="write {model: NAME, prompts: [...]}")


def _check_slice(piece: Slice, path: Path, places: Places) -> None:
    lengths: dict[int, str] = {}
    for index, source in enumerate(piece.sources):
        length = _check_slice_source(source, (*path, "sources", index), places)
        if length is not None:
            lengths[length] = source.model
    if len(lengths) > 1:
        counts = ", ".join(f"{length} of '{model}'" for length, model in lengths.items())
        what = f"the sources of a slice must have as many layers each, not {counts}"
        raise RecipeError(what, where=places.key((*path, "sources")))
    names = [source.model for source in piece.sources]
    _check_params(piece.params, names, (*path, "params"), places)
    _check_rules(piece.rules, names, path, places)


def _check_slice_source(source: SliceSource, path: Path, places: Places) -> int | None:
    """Returns the number of layers, where it does not depend on the model."""
    selection = parse_layers(source.layers, where=places.value((*path, "layers")))
    _check_weight(source.weight, (*path, "weight"), places)
    for name, value in source.params.items():
        at = (*path, "params", name)
        if isinstance(value, dict):
            what = f"'{name}' is given for one source here, and takes no names of sources"
            raise RecipeError(what, where=places.value(at))
        _check_value(value, at, places)
    return selection.length()


def _check_rules(rules: Sequence[Rule], sources: Sequence[str], path: Path, places: Places) -> None:
    for index, rule in enumerate(rules):
        _check_rule(rule, sources, (*path, "rules", index), places)


def _check_rule(rule: Rule, sources: Sequence[str], path: Path, places: Places) -> None:
    if rule.layers is not None:
        parse_layers(rule.layers, where=places.value((*path, "layers")))
    if rule.depth is not None and not (len(rule.depth) == 2 and 0 <= rule.depth[0] <= rule.depth[1] <= 1):
        what = f"'depth' must be two numbers from 0 to 1, the smaller first, not {shown(rule.depth)}"
        raise RecipeError(what, where=places.value((*path, "depth")))
    globs = [rule.match] if isinstance(rule.match, str) else rule.match
    if globs is not None and (not globs or not all(globs)):
        raise RecipeError("an empty glob matches nothing", where=places.value((*path, "match")))
    actions = [key for key in ("method", "take", "drop") if getattr(rule, key)]
    changes = [key for key in ("params", "weights") if getattr(rule, key)]
    if len(actions) > 1:
        raise RecipeError(f"a rule has either '{actions[0]}' or '{actions[1]}'", where=places.key((*path, actions[1])))
    if changes and actions and actions[0] != "method":
        what = f"tensors that are {'dropped' if rule.drop else 'taken'} have no {changes[0]}"
        raise RecipeError(what, where=places.key((*path, changes[0])))
    if not actions and not changes:
        hint = "give it params, weights, method, take or drop"
        raise RecipeError("a rule that changes nothing", where=places.key(path), hint=hint)
    _check_params(rule.params, sources, (*path, "params"), places)
    _check_rule_weights(rule, sources, (*path, "weights"), places)


def _check_rule_weights(rule: Rule, sources: Sequence[str], path: Path, places: Places) -> None:
    if isinstance(rule.weights, dict):
        for name, weight in rule.weights.items():
            _check_source(name, sources, (*path, name), places)
            _check_weight(weight, (*path, name), places)
    elif rule.weights is not None:
        if len(rule.weights) != len(sources):
            what = f"{len(rule.weights)} weights for {len(sources)} sources"
            raise RecipeError(what, where=places.value(path), hint="give one for each source, or {source: weight}")
        for index, weight in enumerate(rule.weights):
            _check_weight(weight, (*path, index), places)


def _check_params(params: dict[str, Value], sources: Sequence[str], path: Path, places: Places) -> None:
    for name, value in params.items():
        at = (*path, name)
        if not isinstance(value, dict):
            _check_value(value, at, places)
            continue
        if not value:
            raise RecipeError(f"'{name}' is an empty mapping", where=places.value(at))
        for source, inner in value.items():
            _check_source(source, sources, (*at, source), places)
            if isinstance(inner, dict):
                raise RecipeError(f"'{name}' is nested too deep", where=places.value((*at, source)))
            _check_value(inner, (*at, source), places)


def _check_value(value: Value, path: Path, places: Places) -> None:
    if isinstance(value, list):
        if not value:
            raise RecipeError("an empty list has no value", where=places.value(path))
        if any(isinstance(item, dict) for item in value):
            raise RecipeError("a list of values cannot hold mappings", where=places.value(path))


def _check_weight(weight: Value, path: Path, places: Places) -> None:
    values = weight if isinstance(weight, list) and weight else [weight]
    if weight is not None and not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        what = f"a weight is a number, or a list of numbers over the layers, not {shown(weight)}"
        raise RecipeError(what, where=places.value(path))


def _check_source(name: str, sources: Sequence[str], path: Path, places: Places) -> None:
    if name not in sources:
        hint = hint_for(name, sources)
        raise RecipeError(f"'{name[:80]}' is not a source here", where=places.key(path), hint=hint)
