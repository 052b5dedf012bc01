"""The graph of models and steps: that every name stands for something, and that steps do not go in circles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places
from mergekit_px.recipe.model import MEAN, Recipe, Rule, Step

LONGEST_CHAIN = 64
"""Steps that may depend on one another in a row; what reads the graph later is recursive."""


def references(step: Step, path: Path) -> Iterator[tuple[Path, str]]:
    """Every model or step that a step names, each with the path where it does."""
    if step.base is not None:
        yield (*path, "base"), step.base
    by_name = isinstance(step.sources, dict)
    for index, name in enumerate(step.source_names()):
        yield (*path, "sources", name if by_name else index), name
    yield from _taken(step.rules, path)
    for number, piece in enumerate(step.slices or ()):
        at = (*path, "slices", number)
        if piece.base is not None:
            yield (*at, "base"), piece.base
        for index, source in enumerate(piece.sources):
            yield (*at, "sources", index, "model"), source.model
        yield from _taken(piece.rules, at)
    if step.mixture is not None:
        at = (*path, "mixture")
        for index, expert in enumerate(step.mixture.experts):
            yield (*at, "experts", index, "model"), expert.model
        if step.mixture.shared is not None:
            yield (*at, "shared", "model"), step.mixture.shared.model
        if step.mixture.router.model is not None:
            yield (*at, "router", "model"), step.mixture.router.model


def _taken(rules: Iterable[Rule], path: Path) -> Iterator[tuple[Path, str]]:
    for index, rule in enumerate(rules):
        if rule.take is not None:
            yield (*path, "rules", index, "take"), rule.take


def check_reference(recipe: Recipe, name: str, path: Path, places: Places) -> None:
    """Raises RecipeError where a name is that of no model or step."""
    if name in recipe.models or name in recipe.steps:
        return
    hint = hint_for(name, [*recipe.models, *recipe.steps])
    if "/" in name or name.startswith((".", "~")):
        own = next((model for model, entry in recipe.models.items() if entry.model == name), None)
        given = f"write '{own}'" if own is not None else f"name it under models, as in models: {{mine: {name[:80]}}}"
        hint = f"models go by name here: {given}"
    raise RecipeError(f"no model or step is named '{name[:80]}'", where=places.value(path), hint=hint)


def check_graph(recipe: Recipe, places: Places) -> None:
    """Refuse unknown names, circles, and chains of steps without end.

    Raises:
        RecipeError: the first such thing.
    """
    edges: dict[str, dict[str, Path]] = {}
    for name, step in recipe.steps.items():
        edges[name] = {}
        for path, target in references(step, ("steps", name)):
            if target != MEAN or path != ("steps", name, "base"):
                check_reference(recipe, target, path, places)
            if target in recipe.steps:
                edges[name].setdefault(target, path)
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        shown = " -> ".join(circle[:8]) + (" ..." if len(circle) > 8 else "")
        where = places.value(edges[circle[0]][circle[1]])
        raise RecipeError(f"steps depend on one another in a circle: {shown}", where=where) from None
    length: dict[str, int] = {}
    for name in order:
        length[name] = 1 + max((length[target] for target in edges[name]), default=0)
        if length[name] > LONGEST_CHAIN:
            what = f"more than {LONGEST_CHAIN} steps depend on one another in a row"
            raise RecipeError(what, where=places.key(("steps", name)))
