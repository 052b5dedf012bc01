"""Which values are tried next.

A strategy is a generator: it yields a batch of points, each a list of values, one for each variable, and is sent their
gains, for each point one for each objective, of which more is better. Points of one batch do not depend on one another
and may be tried side by side. It draws nothing but from its seed, so equal gains make it take the same way again.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mergekit_px.errors import UsageError
from mergekit_px.learn.search.space import Variable, as_written

Strategy = Literal["grid", "golden", "coordinate", "cma", "nsga2"]
Point = list[float]
Search = Generator[list[Point], list[Sequence[float]], None]
OfOne = Generator[list[Point], list[float], None]
"""A search by one number."""

FOLLOW_ALL: frozenset[Strategy] = frozenset({"grid", "nsga2"})
"""Strategies that do not go by the first objective alone."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_GRID_BATCH = 1024
"""Points of a grid that are asked for at once: it may have more than fit in memory."""
_POPULATION = 12
"""Of NSGA-II. Small, as each point is a merge: generations matter more than their size on few variables."""


@dataclass(frozen=True, slots=True)
class StrategyOptions:
    """Attributes:
    points: values of a variable that has only a range, in a grid.
    tolerance: where golden section stops, in shares of the range.
    rounds: how often ``coordinate`` goes through all variables, at most.
    seed: of CMA-ES and NSGA-II.
    objectives: how many there are.
    start: points that were tried already, the best first: where ``coordinate`` and CMA-ES begin, instead of the middle
        of all ranges, and what NSGA-II begins with.
    """

    points: int = 5
    tolerance: float = 0.02
    rounds: int = 3
    seed: int = 0
    objectives: int = 1
    start: Sequence[Sequence[float]] = ()

    def shares(self, variables: Sequence[Variable]) -> list[float]:
        """Where to begin, in shares of the ranges."""
        if not self.start:
            return [0.5] * len(variables)
        return [variable.share(value) for variable, value in zip(variables, self.start[0], strict=True)]


def begin_search(strategy: Strategy, variables: Sequence[Variable], options: StrategyOptions) -> Search:
    """The generator of a strategy.

    Raises:
        UsageError: a strategy that the variables do not suit, or one without its library.
    """
    if not variables:
        raise UsageError("nothing is to be searched", hint="give --over KEY=LOW:HIGH")
    keys = [key for variable in variables for key in variable.keys]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"{twice} is searched twice", where="--over")
    if strategy == "grid":
        return grid(variables, options.points)
    if strategy == "nsga2":
        _require("optuna", "NSGA-II")
        return genetic(variables, options)
    listed = next((variable for variable in variables if variable.values), None)
    if listed is not None:
        raise UsageError(
            f"{strategy} takes any value of a range", where=f"--over {listed.name}", hint="use --how grid or nsga2"
        )
    if strategy == "golden":
        if len(variables) > 1:
            raise UsageError("golden section searches one value", hint="use --how coordinate")
        return _by_first(golden(variables[0], options.tolerance))
    if strategy == "coordinate":
        return _by_first(coordinate(variables, options))
    if len(variables) == 1:
        raise UsageError("CMA-ES searches two values or more", hint="use --how golden")
    _require("cma", "CMA-ES")
    return _by_first(evolution(variables, options))


def _require(library: str, what: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UsageError(f"{what} needs the library {library}", hint='run: pip install "pxmerge[search]"')


def _by_first(search: OfOne) -> Search:
    """A search by one number, told the first objective."""
    batch = next(search)
    while True:
        gains = yield batch
        try:
            batch = search.send([gain[0] for gain in gains])
        except StopIteration:
            return


def grid(variables: Sequence[Variable], points: int) -> Search:
    """All combinations; the last variable changes fastest."""
    combinations = itertools.product(*(variable.grid(points) for variable in variables))
    while batch := [list(values) for values in itertools.islice(combinations, _GRID_BATCH)]:
        yield batch


def golden(variable: Variable, tolerance: float) -> OfOne:
    """Golden section search (Kiefer, 1953): finds the maximum of a score that rises and then falls."""
    yield from _golden(lambda share: [variable.at(share)], tolerance)


def coordinate(variables: Sequence[Variable], options: StrategyOptions) -> OfOne:
    """Golden section along one variable after another, the others at their best.

    Ends when no variable moves further than the tolerance in a whole round.
    """
    best = options.shares(variables)
    for _ in range(options.rounds):
        before = list(best)
        for index in range(len(variables)):
            best[index] = yield from _golden(_along(variables, best, index), options.tolerance)
        if all(abs(new - old) <= options.tolerance for new, old in zip(best, before, strict=True)):
            return


def _along(variables: Sequence[Variable], best: Sequence[float], index: int) -> Callable[[float], Point]:
    fixed = list(best)

    def point(share: float) -> Point:
        shares = [*fixed[:index], share, *fixed[index + 1 :]]
        return [variable.at(one) for variable, one in zip(variables, shares, strict=True)]

    return point


def _golden(point: Callable[[float], Point], tolerance: float) -> Generator[list[Point], list[float], float]:
    """Returns the share that scored best."""
    low, high = 0.0, 1.0
    left, right = high - _GOLDEN, low + _GOLDEN
    at_left, at_right = yield [point(left), point(right)]
    while high - low > tolerance:
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            (at_left,) = yield [point(left)]
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            (at_right,) = yield [point(right)]
    return left if at_left >= at_right else right


def evolution(variables: Sequence[Variable], options: StrategyOptions) -> OfOne:
    """CMA-ES (Hansen, arXiv:1604.00772) on ranges scaled to [0, 1], with a spread of a quarter; a batch is a
    generation."""
    cma = importlib.import_module("cma")
    drawn = np.random.RandomState(options.seed + 1).randn  # its own: what scores a model may seed numpy's
    settings = {"bounds": [0, 1], "seed": math.nan, "randn": drawn, "verbose": -9, "verb_log": 0, "verb_disp": 0}
    evolved = cma.CMAEvolutionStrategy(options.shares(variables), 0.25, settings)
    while not evolved.stop():
        generation = evolved.ask()
        gains = yield [
            [variable.at(float(share)) for variable, share in zip(variables, shares, strict=True)]
            for shares in generation
        ]
        losses = [-gain for gain in gains]
        worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
        evolved.tell(generation, [loss if math.isfinite(loss) else worst + 1.0 for loss in losses])


def genetic(variables: Sequence[Variable], options: StrategyOptions) -> Search:
    """NSGA-II (Deb et al., 2002) for several objectives at once; a batch is a generation, and it has no end."""
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=options.seed)
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * options.objectives)
    ranges = {
        variable.name: optuna.distributions.CategoricalDistribution(variable.values)
        if variable.values
        else optuna.distributions.FloatDistribution(variable.low, variable.high)
        for variable in variables
    }
    for point in options.start:
        study.enqueue_trial(dict(zip(ranges, point, strict=True)))
    while True:
        asked = [study.ask(ranges) for _ in range(_POPULATION)]
        gains = yield [[as_written(float(trial.params[name])) for name in ranges] for trial in asked]
        for trial, found in zip(asked, gains, strict=True):
            if all(map(math.isfinite, found)):
                study.tell(trial, list(found))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
