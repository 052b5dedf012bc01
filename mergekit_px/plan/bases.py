"""What stands in for a base that the recipe leaves out.

1. Sources that are all task vectors need none: the result is a task vector.
2. Full checkpoints whose cards name one common base model: that one.
3. ``base: mean`` is the mean of the sources (centred task vectors, arXiv:2412.12153). It is taken unasked only for
   methods that declare it meaningful, and from three sources on: the task vectors of two around their mean are
   opposites, and where signs vote or task vectors are added up, nothing is left but rounding noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePath

from mergekit_px.checkpoint.destination import LOCK_FILE
from mergekit_px.errors import InputError, PlanError
from mergekit_px.methods import find_method
from mergekit_px.plan.inputs import ResolvedInput, resolve_input
from mergekit_px.plan.lock import Lock, read_lock
from mergekit_px.recipe.model import MEAN, ModelInput, Recipe, Step

DECLARED_BASE = "declared_base"


def complete_bases(
    recipe: Recipe,
    inputs: Mapping[str, ResolvedInput],
    used: Collection[str],
    *,
    allow_pickle: bool,
    lock: Lock | None = None,
) -> tuple[Recipe, dict[str, ResolvedInput], list[str]]:
    """The recipe with every base filled in, the inputs that this adds, and what to tell the user.

    ``used``: the models and steps that the result needs; of others nothing was opened.
    """
    added: dict[str, ResolvedInput] = {}
    notes: list[str] = []
    steps = dict(recipe.steps)
    models = dict(recipe.models)
    for name, step in recipe.steps.items():
        if name not in used:
            continue
        asked = step.base == MEAN and MEAN not in recipe.models and MEAN not in recipe.steps
        if (step.base is not None and not asked) or step.slices is not None:
            continue
        adapters = [source for source in step.source_names() if source in inputs and inputs[source].adapter_only]
        full = [source for source in step.source_names() if not _is_delta(source, inputs, recipe)]
        if not adapters and not (full and _works_on_deltas(step)):
            continue
        declared = None if asked else _declared_base(adapters or full, inputs)
        if declared is None and adapters:
            raise PlanError(
                f"step '{name}' merges adapters, which need the model that they were trained on",
                hint="give it as base (--base)",
            )
        if declared is not None:
            if DECLARED_BASE not in added:
                request = ModelInput(model=declared if lock is None else lock.pin(DECLARED_BASE, declared))
                added[DECLARED_BASE] = resolve_input(
                    DECLARED_BASE,
                    request,
                    allow_pickle=allow_pickle,
                    where=f"base model of {', '.join(adapters or full)}",
                )
                models[DECLARED_BASE] = request
            said = "adapters" if adapters else "sources' cards"
            notes.append(f"no base given: the {said} name {declared}, which is taken as the base of '{name}'")
            steps[name] = step.model_copy(update={"base": DECLARED_BASE})
            continue
        if not asked and (len(full) < 3 or not _is_centred(step)):
            raise PlanError(
                f"step '{name}': {step.method} works on task vectors, and there is no base to take them from",
                hint="give the model that the sources were trained from as base (--base), or `mean` for their mean",
            )
        centre = f"{name}_centre"
        steps[centre] = Step(method="linear", sources=full, missing=step.missing, vocabulary=step.vocabulary)
        steps[name] = step.model_copy(update={"base": centre})
        notes.append(
            f"{'as asked' if asked else 'no base given (--base)'}: the mean of {', '.join(full)} is the base "
            f"of '{name}' (centred task vectors, arXiv:2412.12153)"
        )
    return recipe.model_copy(update={"steps": steps, "models": models}), added, notes


def swapped_note(base: ResolvedInput, tuned: ResolvedInput) -> str | None:
    """What is said where the card or lock of a base names the fine-tune among what it was made from."""
    if base.is_task_vector or not _is_made_from(base, tuned) or _is_made_from(tuned, base):
        return None
    return f"'{base.reference}', given as the base, says that it was made from '{tuned.reference}': are they swapped?"


def _is_made_from(model: ResolvedInput, other: ResolvedInput) -> bool:
    sources = list(model.declared_bases())
    if model.checkpoint.directory is not None:
        with suppress(InputError):
            lock = read_lock(model.checkpoint.directory / LOCK_FILE)
            sources += [locked.reference for locked in lock.inputs.values()]
    return PurePath(other.source).name in (PurePath(source).name for source in sources)


def _is_centred(step: Step) -> bool:
    names = [step.method, *(rule.method for rule in step.rules if rule.method is not None)]
    return all(find_method(name).centred for name in names if find_method(name).space == "deltas")


def _works_on_deltas(step: Step) -> bool:
    names = [step.method, *(rule.method for rule in step.rules if rule.method is not None)]
    return any(find_method(name).space == "deltas" for name in names)


def _is_delta(name: str, inputs: Mapping[str, ResolvedInput], recipe: Recipe) -> bool:
    if name in inputs:
        return inputs[name].is_task_vector
    step = recipe.steps[name]
    return (
        step.base is None
        and bool(step.source_names())
        and all(_is_delta(source, inputs, recipe) for source in step.source_names())
    )


def _declared_base(sources: list[str], inputs: Mapping[str, ResolvedInput]) -> str | None:
    """The one base that the cards of all sources name, if it can be found."""
    found: set[str] = set()
    for source in sources:
        bases = inputs[source].declared_bases() if source in inputs else ()
        if len(bases) != 1:
            return None
        found.update(bases)
    if len(found) != 1:
        return None
    base = found.pop()
    from mergekit_px.hub.reference import parse_reference

    return base if Path(base).expanduser().exists() or parse_reference(base) is not None else None
