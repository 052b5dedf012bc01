"""A search: merge, score, and again; then the best recipe is merged and tested.

<output>/model/            what the best recipe makes
<output>/trials.jsonl      every trial
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.errors import NonFiniteError, RecipeError, RunError
from mergekit_px.execute.run import run_plan
from mergekit_px.learn.life import Run
from mergekit_px.learn.search.reuse import unchanged, with_kept
from mergekit_px.learn.search.score import DataScore, Score, command_score
from mergekit_px.learn.search.settings import SearchReport, SearchSettings
from mergekit_px.learn.search.space import Variable, overrides
from mergekit_px.learn.search.strategies import StrategyOptions, begin_search
from mergekit_px.learn.search.trials import Trial, TrialLog
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe

LOG = "trials.jsonl"
MODEL = "model"
_TRIAL = "trial"
_KEPT = "kept"


def fit(run: Run[SearchSettings]) -> SearchReport:
    """Search; the recipe as it is written is the first trial, and values that were tried are never merged again.

    Raises:
        UsageError, RecipeError, InputError, PlanError: what cannot be searched.
        OutputError: a finished search there is another.
        RunError: a command that fails; the trials until then are in the log.
    """
    settings, variables = run.settings, run.settings.variables
    strategy = StrategyOptions(points=settings.points, tolerance=settings.tolerance, seed=settings.seed)
    begin_search(settings.how, variables, strategy).close()
    validation, test = _scores(run)
    work = _Merges(run)
    first = work.plan(())
    work.keep(first, [plan for variable in variables for plan in work.ends(variable)])
    log = _log(run, hashlib.sha256(f"{run.identity} {first.hash}".encode()).hexdigest())
    sign = -1.0 if settings.minimize else 1.0

    def scored(values: Sequence[float]) -> Trial:
        known = log.find(values)
        plan = first if known is not None else work.plan(values)
        if known is None and plan.hash == first.hash:
            known = log.find(())  # the recipe as written, with its values spelt out
        trial = known
        if trial is None:
            begin = time.monotonic()
            score = work.score(plan, validation)
            trial = log.add(values, score if math.isfinite(score) else None, time.monotonic() - begin)
        said = " ".join(
            f"{variable.name}={value:.6g}" for variable, value in zip(variables, trial.values, strict=False)
        )
        found = "not finite" if trial.score is None else f"{trial.score:.6g}"
        run.note(f"{said or 'as written'}: {found}{'' if known is None else ' (from the log)'}")
        return trial

    try:
        as_written = scored(())
        tried = [as_written, *_searched(run, strategy, scored, sign)]
        best = max(tried, key=lambda trial: -math.inf if trial.score is None else sign * trial.score)
        if best.score is None:
            raise RunError("no trial has a score that is a finite number", where=str(run.work / LOG))
        tests = _tested(work, test, as_written, best)
        work.merge(best.values, MODEL)
    finally:
        for name in (_TRIAL, _KEPT):
            shutil.rmtree(run.work / name, ignore_errors=True)
        if not log.trials:  # nothing to go on with
            log.remove()
    shutil.copyfile(run.work / LOG, run.stage / LOG)
    return SearchReport(
        variables=[asdict(variable) for variable in variables],
        score=settings.score or "accuracy",
        trials=len(log.trials),
        failed=sum(trial.score is None for trial in log.trials),
        best={
            "trial": best.number,
            "set": overrides(variables, best.values) if best.values else [],
            "values": {variable.name: value for variable, value in zip(variables, best.values, strict=False)},
        },
        scores={
            "as written": {"validation": as_written.score, **({"test": tests[0]} if tests else {})},
            "best": {"validation": best.score, **({"test": tests[1]} if tests else {})},
        },
    )


def _log(run: Run[SearchSettings], identity: str) -> TrialLog:
    """The log of an unfinished search, or of a finished one that is gone on with, or a new one."""
    place, finished = run.work / LOG, run.output / LOG
    if not run.settings.resume or place.exists() or not finished.exists():
        return TrialLog(place, identity)
    shutil.copyfile(finished, place)
    try:
        return TrialLog(place, identity)
    except BaseException:
        place.unlink()
        raise


def _searched(
    run: Run[SearchSettings], strategy: StrategyOptions, scored: Callable[[Sequence[float]], Trial], sign: float
) -> list[Trial]:
    """The trials that the strategy asks for, until it ends or there are as many as allowed."""
    settings = run.settings
    search = begin_search(settings.how, settings.variables, strategy)
    tried: dict[int, Trial] = {}
    values = next(search, None)
    while values is not None and len(tried) < settings.trials:
        trial = scored(values)
        tried[trial.number] = trial
        try:
            values = search.send(-math.inf if trial.score is None else sign * trial.score)
        except StopIteration:
            break
    return list(tried.values())


def _tested(work: _Merges, test: Score | None, as_written: Trial, best: Trial) -> tuple[float | None, ...]:
    """Test scores of the recipe as written and of the best one; the only use of the test."""
    if test is None:
        return ()
    found = [work.score(work.plan(trial.values), test) for trial in (as_written, best)]
    return tuple(score if math.isfinite(score) else None for score in found)


class _Merges:
    """Merges of one recipe under other values.

    Inputs are resolved once. Tensors that no searched value touches are merged once and copied from then on.
    """

    def __init__(self, run: Run[SearchSettings]) -> None:
        self._run = run
        self._variables = run.settings.variables
        self._folder = run.work / _TRIAL
        self._inputs: dict[str, ResolvedInput] = {}
        changed = [key for variable in self._variables for key in variable.keys]
        self._same_inputs = not any(key.startswith("models") for key in changed)
        self._kept: Plan | None = None
        self._is_kept = False

    def plan(self, values: Sequence[float], output: Path | None = None) -> Plan:
        """The plan under these values; of the recipe as written for none."""
        return self.plan_with(overrides(self._variables, values) if values else [], output)

    def plan_with(self, changes: Sequence[str], output: Path | None = None) -> Plan:
        settings = self._run.settings
        changed = [*settings.assignments, *changes]
        loaded = load_recipe(settings.recipe, overrides=changed, methods=method_catalog())
        plan = build_plan(
            loaded,
            PlanOptions(
                output=output or self._folder,
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

    def ends(self, variable: Variable) -> list[Plan]:
        """The plans at both ends of a range. Raises ``RecipeError`` for a key that is none, or takes no such value."""
        try:
            return [self.plan_with(overrides([variable], [end])) for end in (variable.low, variable.high)]
        except RecipeError as error:
            raise RecipeError(error.what, where=f"--over {variable.name}", hint=error.hint) from error

    def merge(self, values: Sequence[float], name: str) -> None:
        """Merge under these values for a folder of that name in the output."""
        run_plan(replace(self.plan(values, self._run.output / name), output=self._run.stage / name))

    def score(self, plan: Plan, score: Score) -> float:
        """The score of what a plan makes; NaN where the merge is not finite."""
        try:
            run_plan(self._with_kept(plan))
            return score(self._folder)
        except NonFiniteError:
            return math.nan

    def keep(self, first: Plan, others: Sequence[Plan]) -> None:
        """Have a first merge kept for the others, if anything is alike in all of them."""
        if self._same_inputs and set.intersection(*(unchanged(first, plan) for plan in others)):
            self._kept = replace(first, output=self._folder.with_name(_KEPT))

    def _with_kept(self, plan: Plan) -> Plan:
        if self._kept is None or self._kept.output is None:
            return plan
        if not self._is_kept:  # what a killed search left there may be of another one
            run_plan(self._kept)
            self._is_kept = True
        return with_kept(plan, unchanged(self._kept, plan), self._kept.output)


def _scores(run: Run[SearchSettings]) -> tuple[Score, Score | None]:
    """What the choice is by, and what the result is tested by."""
    settings = run.settings
    if settings.score is not None:
        test = command_score(settings.test_score) if settings.test_score is not None else None
        return command_score(settings.score), test
    scores = DataScore(settings, run.device)
    return scores.score("validation"), scores.score("test") if settings.test != 0 else None
