"""Merges of one recipe under other values; tensors that are the same in every trial are merged once and copied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import RecipeError
from mergekit_px.execute.run import run_plan
from mergekit_px.learn.search.settings import SearchSettings
from mergekit_px.learn.search.space import Variable, overrides
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.nodes import Read
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe


class Merges:
    """Makes models of a recipe, one at a time. Inputs are resolved once.

    Args:
        threads: of a merge.
    """

    def __init__(self, settings: SearchSettings, threads: int | None = None) -> None:
        self._settings, self._threads = settings, threads or settings.threads
        self._variables = settings.variables
        self._inputs: dict[str, ResolvedInput] = {}
        changed = [key for variable in self._variables for key in variable.keys]
        self._same_inputs = not any(key.startswith("models") for key in changed)
        self._first = self.plan(())

    @property
    def first(self) -> Plan:
        """Of the recipe as it is written."""
        return self._first

    def keeps(self) -> bool:
        """Whether there are tensors that no searched value touches, which are merged once and copied from then on.

        Raises ``RecipeError`` for a key that is none, or takes no such value.
        """
        alike = [unchanged(self._first, plan) for variable in self._variables for plan in self._ends(variable)]
        return self._same_inputs and bool(set.intersection(*alike))

    def plan(self, values: Sequence[float], output: Path | None = None) -> Plan:
        """The plan under these values; of the recipe as written for none."""
        return self._plan_with(overrides(self._variables, values) if values else [], output)

    def keep(self, folder: Path) -> None:
        """Merge the recipe as it is written, for what trials copy from it."""
        run_plan(replace(self._first, output=folder))

    def make(self, plan: Plan, folder: Path, kept: Path | None) -> None:
        """Merge for a score, with what is `kept` elsewhere. Raises what a merge does."""
        plan = replace(plan, output=folder)
        if kept is not None:
            plan = with_kept(plan, unchanged(self._first, plan), kept)
        run_plan(plan)

    def publish(self, values: Sequence[float], output: Path, stage: Path) -> None:
        """Merge under these values for a folder, in another place that is moved there."""
        run_plan(replace(self.plan(values, output), output=stage))

    def _plan_with(self, changes: Sequence[str], output: Path | None = None) -> Plan:
        settings = self._settings
        changed = [*settings.assignments, *changes]
        loaded = load_recipe(settings.recipe, overrides=changed, methods=method_catalog())
        plan = build_plan(
            loaded,
            PlanOptions(
                output=output or Path("trial"),
                device=settings.device,
                memory=None if settings.memory is None else parse_size(settings.memory, "--memory"),
                threads=self._threads,
                mode="overwrite",
                allow_pickle=settings.allow_pickle,
                hash_inputs=output is not None,
            ),
            self._inputs,
        )
        if self._same_inputs:
            self._inputs.update(plan.inputs)
        return plan

    def _ends(self, variable: Variable) -> list[Plan]:
        """The plans at both ends of a range. Raises ``RecipeError`` for a key that is none, or takes no such value."""
        try:
            return [self._plan_with(overrides([variable], [end])) for end in (variable.low, variable.high)]
        except RecipeError as error:
            raise RecipeError(error.what, where=f"--over {variable.name}", hint=error.hint) from error


_KEPT = "kept merge"


def unchanged(first: Plan, second: Plan) -> set[str]:
    """Names of the tensors that both plans compute, and compute alike.

    Statistics over the whole model depend on other tensors, so what needs them never counts.
    """
    if first.seed != second.seed:
        return set()
    alike = {item.name: _meaning(item) for item in first.items if _may_be_kept(item)}
    return {item.name for item in second.items if item.name in alike and alike[item.name] == _meaning(item)}


def with_kept(plan: Plan, names: set[str], folder: Path) -> Plan:
    """The plan with some of its tensors copied from a finished merge that made them alike."""
    kept = open_checkpoint(folder)
    items = tuple(
        replace(item, node=Read(_KEPT, kept.tensors[item.name], item.shape, item.node.kind))
        if item.name in names
        else item
        for item in plan.items
    )
    return replace(plan, lock=None, items=items, inputs={**plan.inputs, _KEPT: ResolvedInput(_KEPT, str(folder), kept)})


def _may_be_kept(item: WorkItem) -> bool:
    return item.action == "merge" and not any(
        node.method.statistics is not None and node.method.scope(node.params) == "model" for node in item.applied
    )


def _meaning(item: WorkItem) -> str:
    shapes = [read.shape for read in item.reads]  # a part of a stored tensor may be read
    indices = [node.source_indices for node in item.applied]
    return json.dumps([item.dtype.name, item.shape, item.node.describe(), shapes, indices])
