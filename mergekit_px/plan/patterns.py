"""Models of a recipe that are patterns, ``./run/checkpoint-*``: each stands for the checkpoints of a run, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_px.checkpoint.training_run import check_spacing, is_pattern, training_run
from mergekit_px.errors import RecipeError
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import ModelInput, Rule, Step

Members = Mapping[str, Sequence[str]]
"""The model that is a pattern -> the models that it stands for, in order of step."""


def expanded(loaded: LoadedRecipe) -> tuple[LoadedRecipe, list[str]]:
    """The recipe with each pattern's matches in its place, and what to tell of them.

    A step that lists the pattern as a source gets all of them, each with the weight and parameters given to it.

    Raises:
        InputError: nothing matches, or a step is missing or double.
        RecipeError: a pattern where only one model can be meant.
    """
    recipe = loaded.recipe
    models: dict[str, ModelInput] = {}
    members: dict[str, list[str]] = {}
    notes: list[str] = []
    for name, request in recipe.models.items():
        if request.model is None or not is_pattern(request.model):
            models[name] = request
            continue
        run = training_run([request.model])
        check_spacing(run.steps, request.model)
        notes += run.notes
        members[name] = []
        for number, checkpoint in enumerate(run.checkpoints, 1):
            one = f"{name}-{number if checkpoint.step is None else checkpoint.step}"
            if one in recipe.models or one in recipe.steps:
                raise RecipeError(
                    f"'{name}' stands for a model that would be named '{one}', as another one is",
                    where=loaded.where("models", name),
                    hint="rename one of them",
                )
            models[one] = request.model_copy(update={"model": checkpoint.reference})
            members[name].append(one)
        notes.append(f"'{name}' stands for {len(run.checkpoints)} checkpoints{_span(run.steps)}")
    if not members:
        return loaded, []
    steps = {name: _step(name, step, members, loaded) for name, step in recipe.steps.items()}
    output = recipe.output
    if output.from_ in members:
        raise _several(str(output.from_), members, loaded.where("output", "from"))
    donors = {key: members[name][-1] for key in ("config_from", "tokenizer_from")
              if (name := getattr(output, key)) in members}  # fmt: skip
    changed = recipe.model_copy(update={"models": models, "steps": steps, "output": output.model_copy(update=donors)})
    return replace(loaded, recipe=changed), notes


def _span(steps: Sequence[int]) -> str:
    return f", from step {steps[0]} to step {steps[-1]}" if len(steps) > 1 else ""


def _step(name: str, step: Step, members: Members, loaded: LoadedRecipe) -> Step:
    where = loaded.where("steps", name)
    single = [step.base, *(rule.take for rule in step.rules)]
    for piece in step.slices or ():
        single += [piece.base, *(source.model for source in piece.sources), *(rule.take for rule in piece.rules)]
    for one in single:
        if one in members:
            raise _several(str(one), members, where)
    sources: Any = step.sources
    if isinstance(sources, Mapping):
        sources = _by_name(sources, members)
    else:
        sources = [one for source in sources for one in members.get(source, (source,))]
    rules = [_rule(rule, members) for rule in step.rules]
    return step.model_copy(update={"sources": sources, "params": _params(step.params, members), "rules": rules})


def _rule(rule: Rule, members: Members) -> Rule:
    weights = _by_name(rule.weights, members) if isinstance(rule.weights, Mapping) else rule.weights
    return rule.model_copy(update={"params": _params(rule.params, members), "weights": weights})


def _params(params: Mapping[str, Any], members: Members) -> dict[str, Any]:
    return {key: _by_name(value, members) if isinstance(value, Mapping) else value for key, value in params.items()}


def _by_name(values: Mapping[str, Any], members: Members) -> dict[str, Any]:
    return {one: value for name, value in values.items() for one in members.get(name, (name,))}


def _several(name: str, members: Members, where: str) -> RecipeError:
    return RecipeError(
        f"'{name}' is a pattern that stands for {len(members[name])} models, and one is wanted here",
        where=where,
        hint="name the one that is meant under models",
    )
