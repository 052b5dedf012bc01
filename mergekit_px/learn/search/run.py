"""A search: merge, score, and again; then the best recipe is merged and tested.

<output>/model/            what the best recipe makes
<output>/trials.jsonl      every trial
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mergekit_px.errors import NonFiniteError, RunError
from mergekit_px.learn.life import Run
from mergekit_px.learn.search.bench import Bench, begun_bench
from mergekit_px.learn.search.merges import Merges
from mergekit_px.learn.search.objectives import BALANCED, Metrics, most_balanced, non_dominated, require_objectives
from mergekit_px.learn.search.scorers import Scorers, result_of
from mergekit_px.learn.search.settings import SearchReport, SearchSettings, parse_time
from mergekit_px.learn.search.space import overrides, start_points
from mergekit_px.learn.search.strategies import FOLLOW_ALL, StrategyOptions, begin_search
from mergekit_px.learn.search.trials import LOG, Trial, TrialLog, Values, trial_head

MODEL = "model"


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
    start = [] if settings.start_from is None else start_points(settings.start_from, variables, run.note)
    # Scores first: what cannot be scored need not be planned.
    scorers = Scorers(settings, run.device) if settings.cluster is None else None
    merges = Merges(settings)
    keeps = merges.keeps()
    log = _log(run, hashlib.sha256(f"{run.identity} {merges.first.hash}".encode()).hexdigest())
    try:
        with begun_bench(run, merges, keeps, scorers) as bench:
            trials = _Trials(run, merges, bench, log)
            (as_written,) = trials.of([()])
            stopped = _search(run, strategy, trials, start)
            best, front = _chosen(settings, list(trials.tried.values()), run.work / LOG)
            tests = [trials.test(trial) for trial in (as_written, best)] if settings.tested else []
        merges.publish(best.values, run.output / MODEL, run.stage / MODEL)
    finally:
        if not log.trials:  # nothing to go on with
            log.remove()
    log.write_ordered(run.stage / LOG)
    names = [objective.name for objective in settings.objectives]
    return SearchReport(
        variables=[asdict(variable) for variable in variables],
        score=settings.score or settings.evaluate or "accuracy",
        objectives=[f"{one.name}:{'min' if one.minimize else 'max'}" for one in settings.objectives],
        trials=len(log.trials),
        failed=sum(trial.scores is None for trial in log.trials),
        stopped=stopped,
        best=_described(best, settings),
        pick=settings.picked,
        front=[_described(trial, settings) | {"scores": _of(trial.scores, names)} for trial in front],
        scores={
            what: _shown_scores(names, trial.scores, tests[place] if tests else None)
            for place, (what, trial) in enumerate({"as written": as_written, "best": best}.items())
        },
    )


def _described(trial: Trial, settings: SearchSettings) -> dict[str, Any]:
    variables = settings.variables
    return {
        "trial": trial.number,
        "set": overrides(variables, trial.values) if trial.values else [],
        "values": {variable.name: value for variable, value in zip(variables, trial.values, strict=False)},
    }


def _of(metrics: Metrics | None, names: Sequence[str]) -> dict[str, float | None]:
    return {name: metrics[name] if metrics is not None else None for name in names}


def _shown_scores(names: Sequence[str], found: Metrics | None, test: Metrics | None) -> dict[str, float | None]:
    """What chose and what was tested, by column: one objective needs no name."""
    titles = [("validation", "test")] if len(names) == 1 else [(name, f"test {name}") for name in names]
    columns = {title: value for (title, _), value in zip(titles, _of(found, names).values(), strict=True)}
    if test is not None:
        tested = {name: value if math.isfinite(value) else None for name, value in test.items()}
        columns |= {title: tested.get(name) for (_, title), name in zip(titles, names, strict=True)}
    return columns


def _log(run: Run[SearchSettings], identity: str) -> TrialLog:
    """The log of an unfinished search, or of a finished one that is gone on with, or a new one."""
    settings = run.settings
    head = trial_head(identity, [variable.name for variable in settings.variables], settings.objectives)
    place, finished = run.work / LOG, run.output / LOG
    if not settings.resume or place.exists() or not finished.exists():
        return TrialLog(place, head)
    shutil.copyfile(finished, place)
    try:
        return TrialLog(place, head)
    except BaseException:
        place.unlink()
        raise


def _search(run: Run[SearchSettings], options: StrategyOptions, trials: _Trials, start: Sequence[Values]) -> str:
    """Try what there is to begin with, then what the strategy asks for. Returns why it ended."""
    settings, objectives = run.settings, run.settings.objectives
    if len(objectives) > 1 and settings.how not in FOLLOW_ALL:
        run.note(f"{settings.how} follows {objectives[0].name} and notes the others; --how nsga2 follows all")
    if start:
        begun = trials.of(start[: settings.trials])
        if len(begun) < len(start):
            return trials.ended()
        begun.sort(key=lambda trial: (-objectives[0].gain(trial.scores), trial.number))
        options = replace(options, start=[trial.values for trial in begun if trial.scores is not None and trial.values])
    search = begin_search(settings.how, settings.variables, replace(options, objectives=len(objectives)))
    batch = next(search, None)
    while batch is not None:
        found = trials.of(batch)
        if len(found) < len(batch):
            return trials.ended()
        try:
            batch = search.send([[objective.gain(trial.scores) for objective in objectives] for trial in found])
        except StopIteration:
            break
    return "all was tried"


def _chosen(settings: SearchSettings, tried: Sequence[Trial], log: Path) -> tuple[Trial, list[Trial]]:
    """The trial whose merge is the result, and those that no other beats in every objective."""
    gains = [[objective.gain(trial.scores) for objective in settings.objectives] for trial in tried]
    front = non_dominated(gains)
    if not front:
        raise RunError("no trial has a score that is a finite number", where=str(log))
    if settings.picked == BALANCED:
        place = front[most_balanced([gains[place] for place in front])]
    else:
        column = [objective.name for objective in settings.objectives].index(settings.picked)
        place = max(front, key=lambda place: gains[place][column])
    return tried[place], [tried[place] for place in front]


class _Trials:
    """Has what is asked for merged and scored, several at once. Results come in the order of the asking, whichever
    ends first, so they do not depend on it.

    Attributes:
        tried: those that were asked for, by their number, as written first.
    """

    def __init__(self, run: Run[SearchSettings], merges: Merges, bench: Bench, log: TrialLog) -> None:
        self._run, self._merges, self._bench, self._log = run, merges, bench, log
        self._ends = time.monotonic() + (math.inf if run.settings.time is None else parse_time(run.settings.time))
        self._running: dict[Future[Metrics], tuple[Values, int, float]] = {}
        self.tried: dict[int, Trial] = {}
        self._numbers: dict[Values, int] = {}

    def ended(self) -> str:
        """Why no more is tried."""
        settings, count = self._run.settings, len(self._numbers) - 1
        if count >= settings.trials:
            return f"--trials {settings.trials}"
        self._run.note(f"--time {settings.time} is over after {count} trials; what is best until now is taken")
        return f"--time {settings.time}"

    def of(self, points: Sequence[Sequence[float]]) -> list[Trial]:
        """The trials of these points, in their order; fewer, the first of them, where trials or time end."""
        admitted: list[Values] = []
        found: dict[Values, Trial] = {}
        for values in map(tuple, points):
            if not self._admit(values, found):
                break
            admitted.append(values)
        while self._running:
            found |= self._collect()
        self.tried |= {found[values].number: found[values] for values in admitted}
        self.tried = dict(sorted(self.tried.items()))
        return [found[values] for values in admitted]

    def test(self, trial: Trial) -> Metrics:
        """The test scores of a trial; nothing where its merge is not finite."""
        try:
            metrics = result_of(self._bench.begin(trial.values, self._merges.plan(trial.values), "test"))
        except NonFiniteError:
            return {}
        require_objectives(metrics, self._run.settings.objectives, "the test")
        return metrics

    def _admit(self, values: Values, found: dict[Values, Trial]) -> bool:
        """Take a trial from the log or begin it; no if none may begin any more."""
        if values in found or any(values == running[0] for running in self._running.values()):
            return True
        known, plan = self._log.find(values), self._merges.first
        if known is None and values:
            plan = self._merges.plan(values)
            if plan.hash == self._merges.first.hash:
                known = self._log.find(())  # the recipe as written, with its values spelt out
        number = self._numbers.get(values if known is None else known.values, len(self._numbers))
        if number > self._run.settings.trials or (known is None and values and time.monotonic() > self._ends):
            return False
        self._numbers.setdefault(values if known is None else known.values, number)
        if known is not None:
            found[values] = known
            self._say(known, " (from the log)")
            return True
        places, began = self._bench.places, time.monotonic()
        self._running[self._bench.begin(values, plan, "validation")] = (values, number, began)
        while len(self._running) >= places:
            found |= self._collect()
        return True

    def _collect(self) -> dict[Values, Trial]:
        """The trials that end next. Raises what a score did, when the others that ended are in the log."""
        found: dict[Values, Trial] = {}
        failed: Future[Metrics] | None = None
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            values, number, began = self._running.pop(future)
            error = future.exception()
            if error is None or isinstance(error, NonFiniteError):
                metrics = None if error is not None else future.result()
                found[values] = self._keep(values, number, metrics, began)
            else:
                failed = future
        if failed is not None:
            result_of(failed)
        return found

    def _keep(self, values: Values, number: int, metrics: Metrics | None, began: float) -> Trial:
        """The trial, in the log. What is no finite number is left out of it."""
        settings = self._run.settings
        if metrics is not None:
            where = settings.score or settings.evaluate or str(settings.data)
            require_objectives(metrics, settings.objectives, where)
            if not all(math.isfinite(metrics[objective.name]) for objective in settings.objectives):
                metrics = None
            else:
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        trial = Trial(number, values, metrics, round(time.monotonic() - began, 3))
        self._log.add(trial)
        self._say(trial)
        return trial

    def _say(self, trial: Trial, origin: str = "") -> None:
        settings = self._run.settings
        pairs = zip(settings.variables, trial.values, strict=False)
        said = " ".join(f"{variable.name}={value:.6g}" for variable, value in pairs)
        numbers = _of(trial.scores, [objective.name for objective in settings.objectives]) if trial.scores else {}
        found = ", ".join(
            f"{value:.6g}" if len(numbers) == 1 else f"{name} {value:.6g}" for name, value in numbers.items()
        )
        self._run.note(f"{said or 'as written'}: {found or 'not finite'}{origin}")
