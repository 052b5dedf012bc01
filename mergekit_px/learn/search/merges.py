"""Merges of one recipe under other values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.errors import RecipeError
from mergekit_px.execute.run import run_plan
from mergekit_px.learn.life import Run
from mergekit_px.learn.search.reuse import unchanged, with_kept
from mergekit_px.learn.search.settings import SearchSettings
from mergekit_px.learn.search.space import Variable, overrides
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe

_KEPT = "kept"


class Merges:
    """Makes models of a recipe, one at a time.

    Inputs are resolved once. Tensors that no searched value touches are merged once and copied from then on.
    """

    def __init__(self, run: Run[SearchSettings]) -> None:
        self._run = run
        self._variables = run.settings.variables
        self._inputs: dict[str, ResolvedInput] = {}
        changed = [key for variable in self._variables for key in variable.keys]
        self._same_inputs = not any(key.startswith("models") for key in changed)
        self._first = self.plan(())
        others = [plan for variable in self._variables for plan in self._ends(variable)]
        self._keeps = self._same_inputs and bool(set.intersection(*(unchanged(self._first, plan) for plan in others)))
        self._kept: Plan | None = None

    @property
    def first(self) -> Plan:
        """Of the recipe as it is written."""
        return self._first

    @property
    def folders(self) -> int:
        """How many models there are beside that of a trial."""
        return int(self._keeps)

    def plan(self, values: Sequence[float], output: Path | None = None) -> Plan:
        """The plan under these values; of the recipe as written for none."""
        return self._plan_with(overrides(self._variables, values) if values else [], output)

    def make(self, plan: Plan, folder: Path) -> None:
        """Merge for a score. Raises what a merge does."""
        if self._keeps and self._kept is None:
            self._kept = replace(self._first, output=folder.with_name(_KEPT))
            run_plan(self._kept)
        plan = replace(plan, output=folder)
        if self._kept is not None and self._kept.output is not None:
            plan = with_kept(plan, unchanged(self._kept, plan), self._kept.output)
        run_plan(plan)

    def publish(self, values: Sequence[float], name: str) -> None:
        """Merge under these values for a folder of that name in the output."""
        run_plan(replace(self.plan(values, self._run.output / name), output=self._run.stage / name))

    def _plan_with(self, changes: Sequence[str], output: Path | None = None) -> Plan:
        settings = self._run.settings
        changed = [*settings.assignments, *changes]
        loaded = load_recipe(settings.recipe, overrides=changed, methods=method_catalog())
        plan = build_plan(
            loaded,
            PlanOptions(
                output=output or self._run.work / "trial",
                device=settings.device,
                memory=None if settings.memory is None else parse_size(settings.memory, "--memory"),
                threads=settings.threads,
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
