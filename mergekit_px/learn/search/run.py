"""A search: merge, score, and again; then the best recipe is merged and tested."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_px._version import __version__
from mergekit_px.checkpoint.destination import Mode
from mergekit_px.errors import NonFiniteError, OutputError, RecipeError, RunError, UsageError
from mergekit_px.execute.run import run_plan
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.search.reuse import unchanged, with_kept
from mergekit_px.learn.search.score import DataScore, Score, command_score
from mergekit_px.learn.search.space import Variable, overrides
from mergekit_px.learn.search.strategies import Strategy, StrategyOptions, begin_search
from mergekit_px.learn.search.trials import Trial, TrialLog
from mergekit_px.learn.text_data import NO_TEXT, TextOptions
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe

LOG = "trials.jsonl"
REPORT = "report.json"
MODEL = "model"
_TRIAL = "trial"
_KEPT = "kept"

Tell = Callable[[Trial, bool], None]
"""Gets every trial, and whether it was in the log already."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is searched, how, and by which score.

    Attributes:
        trials: how many merges are scored at most, the recipe as written aside.
        score: a command; or else ``data``.
        minimize: less is better.
        test_score: a command that scores the result, and nothing else.
        data: a file of examples; ``test`` is a share of it, or another file, that is kept for the result.
        text: how rows of text are read.
        assignments: changes to the recipe that hold for all trials.
        memory, threads, device: as for a merge.
    """

    variables: tuple[Variable, ...]
    strategy: Strategy = "grid"
    settings: StrategyOptions = field(default_factory=StrategyOptions)
    trials: int = 100
    score: str | None = None
    minimize: bool = False
    test_score: str | None = None
    data: str | None = None
    text: TextOptions = NO_TEXT
    test: float | str = 0.5
    batch: int = 256
    seed: int = 0
    factory: str | None = None
    allow_code: bool = False
    allow_pickle: bool = False
    assignments: tuple[str, ...] = ()
    device: str = "auto"
    memory: int | None = None
    threads: int | None = None
    mode: Mode = "new"


@dataclass(frozen=True)
class _Scores:
    validation: Score
    test: Score | None
    inputs: dict[str, str]


def run_search(
    recipe: str, output: Path, options: SearchOptions, tell: Tell = lambda trial, known: None
) -> dict[str, Any]:
    """Search, and write ``trials.jsonl``, ``report.json`` and the folder ``model`` into ``output``.

    The recipe as it is written is the first trial. Values that were tried are never merged again.

    Returns:
        the report: the best values, their score, and what the test says of them and of the recipe as written.

    Raises:
        UsageError, RecipeError, InputError, PlanError: what cannot be searched.
        OutputError: the folder is not empty, or holds another search.
        RunError: a command that fails; the trials until then are in the log.
    """
    begin_search(options.strategy, options.variables, options.settings).close()
    scores = _scores(options)
    work = _Merges(recipe, output / _TRIAL, options)
    first = work.plan(())
    work.keep(first, [plan for variable in options.variables for plan in work.ends(variable)])
    _prepare(output, options.mode)
    log = TrialLog(output / LOG, _identity(first, recipe, scores, options))
    sign = -1.0 if options.minimize else 1.0

    def scored(values: Sequence[float]) -> Trial:
        known = log.find(values)
        plan = first if known is not None else work.plan(values)
        if known is None and plan.hash == first.hash:
            known = log.find(())  # the recipe as written, with its values spelt out
        if known is not None:
            tell(known, True)
            return known
        begin = time.monotonic()
        score = work.score(plan, scores.validation)
        trial = log.add(values, score if math.isfinite(score) else None, time.monotonic() - begin)
        tell(trial, False)
        return trial

    try:
        as_written = scored(())
        tried = [as_written, *_searched(options, scored, sign)]
        best = max(tried, key=lambda trial: -math.inf if trial.score is None else sign * trial.score)
        if best.score is None:
            raise RunError("no trial has a score that is a finite number", where=str(output / LOG))
        tests = _tested(work, scores.test, as_written, best)
        work.merge(best.values, output / MODEL)
    finally:
        for name in (_TRIAL, _KEPT):
            shutil.rmtree(output / name, ignore_errors=True)
        if not log.trials:  # nothing to go on with
            log.remove()
    report = {
        "recipe": recipe,
        "inputs": scores.inputs,
        "variables": [asdict(variable) for variable in options.variables],
        "strategy": options.strategy,
        "settings": asdict(options.settings),
        "score": options.score or "accuracy",
        "minimize": options.minimize,
        "trials": len(log.trials),
        "failed": sum(trial.score is None for trial in log.trials),
        "best": {
            "trial": best.number,
            "set": overrides(options.variables, best.values) if best.values else [],
            "values": {variable.name: value for variable, value in zip(options.variables, best.values, strict=False)},
        },
        "scores": {
            "as written": {"validation": as_written.score, **({"test": tests[0]} if tests else {})},
            "best": {"validation": best.score, **({"test": tests[1]} if tests else {})},
        },
        "versions": {"pxmerge": __version__, "torch": torch.__version__},
    }
    write_json(output / REPORT, report)
    return report


def _searched(options: SearchOptions, scored: Callable[[Sequence[float]], Trial], sign: float) -> list[Trial]:
    """The trials that the strategy asks for, until it ends or there are as many as allowed."""
    search = begin_search(options.strategy, options.variables, options.settings)
    tried: dict[int, Trial] = {}
    values = next(search, None)
    while values is not None and len(tried) < options.trials:
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

    def __init__(self, recipe: str, folder: Path, options: SearchOptions) -> None:
        self._recipe = recipe
        self._folder = folder
        self._options = options
        self._inputs: dict[str, ResolvedInput] = {}
        changed = [key for variable in options.variables for key in variable.keys]
        self._same_inputs = not any(key.startswith("models") for key in changed)
        self._kept: Plan | None = None
        self._is_kept = False

    def plan(self, values: Sequence[float], output: Path | None = None) -> Plan:
        """The plan under these values; of the recipe as written for none."""
        return self.plan_with(overrides(self._options.variables, values) if values else [], output)

    def plan_with(self, changes: Sequence[str], output: Path | None = None) -> Plan:
        options = self._options
        loaded = load_recipe(self._recipe, overrides=[*options.assignments, *changes], methods=method_catalog())
        plan = build_plan(
            loaded,
            PlanOptions(
                output=output or self._folder,
                device=options.device,
                memory=options.memory,
                threads=options.threads,
                mode="overwrite",
                allow_pickle=options.allow_pickle,
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

    def merge(self, values: Sequence[float], output: Path) -> None:
        run_plan(self.plan(values, output))

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


def _scores(options: SearchOptions) -> _Scores:
    if (options.score is None) == (options.data is None):
        raise UsageError("a search needs one score", hint="give --score 'COMMAND' or --data FILE")
    if options.score is not None:
        test = command_score(options.test_score) if options.test_score is not None else None
        return _Scores(command_score(options.score), test, {})
    assert options.data is not None
    if options.test_score is not None:
        raise UsageError("--test-score goes with --score", hint="with --data, give --test a share or a file")
    if options.minimize:
        raise UsageError("accuracy is not to be minimised", hint="leave --minimize out")
    scores = DataScore(
        options.data,
        options.test,
        text=options.text,
        factory=options.factory,
        allow_code=options.allow_code,
        device=options.device,
        batch=options.batch,
        seed=options.seed,
    )
    return _Scores(scores.score("validation"), scores.score("test") if scores.has_test else None, scores.inputs)


def _identity(plan: Plan, recipe: str, scores: _Scores, options: SearchOptions) -> str:
    """A hash of everything that the scores follow from, as far as it can be known."""
    left_out = {"mode", "trials", "allow_code", "allow_pickle", "memory", "threads"}
    said = {key: value for key, value in asdict(options).items() if key not in left_out}
    text = json.dumps([plan.hash, Path(recipe).read_text(encoding="utf-8"), scores.inputs, said], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(output: Path, mode: str) -> None:
    if output.is_file():
        raise OutputError("the output is a file, not a folder", where=str(output))
    logged, done = (output / LOG).exists(), (output / REPORT).exists()
    if mode == "resume":
        if not logged and output.is_dir() and any(output.iterdir()):
            raise OutputError("there is no search to go on with, and the folder is not empty", where=str(output))
    elif mode == "overwrite":
        for name in (LOG, REPORT):
            (output / name).unlink(missing_ok=True)
    elif output.is_dir() and any(output.iterdir()):
        raise OutputError(
            "the folder holds an unfinished search" if logged and not done else "the output folder is not empty",
            where=str(output),
            hint="go on with --resume, or start again with --overwrite",
        )
