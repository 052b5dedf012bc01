"""Which values are tried next.

A strategy is a generator: it yields a list of values, one for each variable, and is sent their score, of which more
is better. It draws nothing but from its seed, so equal scores make it take the same way again.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_px.errors import UsageError
from mergekit_px.learn.search.space import Variable

Strategy = Literal["grid", "golden", "coordinate", "cma"]
Search = Generator[list[float], float, None]

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class StrategyOptions:
    """Attributes:
    points: values of a variable that has only a range, in a grid.
    tolerance: where golden section stops, in shares of the range.
    rounds: how often ``coordinate`` goes through all variables, at most.
    seed: of CMA-ES.
    """

    points: int = 5
    tolerance: float = 0.02
    rounds: int = 3
    seed: int = 0


def begin_search(strategy: Strategy, variables: Sequence[Variable], options: StrategyOptions) -> Search:
    """The generator of a strategy.

    Raises:
        UsageError: a strategy that the variables do not suit, or CMA-ES without its library.
    """
    if not variables:
        raise UsageError("nothing is to be searched", hint="give --over KEY=LOW:HIGH")
    keys = [key for variable in variables for key in variable.keys]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"{twice} is searched twice", where="--over")
    if strategy == "grid":
        return grid(variables, options.points)
    listed = next((variable for variable in variables if variable.values), None)
    if listed is not None:
        raise UsageError(f"{strategy} takes any value of a range", where=f"--over {listed.name}", hint="use --how grid")
    if strategy == "golden":
        if len(variables) > 1:
            raise UsageError("golden section searches one value", hint="use --how coordinate")
        return golden(variables[0], options.tolerance)
    if strategy == "coordinate":
        return coordinate(variables, options.tolerance, options.rounds)
    if len(variables) == 1:
        raise UsageError("CMA-ES searches two values or more", hint="use --how golden")
    if importlib.util.find_spec("cma") is None:
        raise UsageError("CMA-ES needs the library cma", hint='run: pip install "pxmerge[search]"')
    return evolution(variables, options.seed)


def grid(variables: Sequence[Variable], points: int) -> Search:
    """All combinations; the last variable changes fastest."""
    for values in itertools.product(*(variable.grid(points) for variable in variables)):
        yield list(values)


def golden(variable: Variable, tolerance: float) -> Search:
    """Golden section search (Kiefer, 1953): finds the maximum of a score that rises and then falls."""
    yield from _golden(lambda share: [variable.at(share)], tolerance)


def coordinate(variables: Sequence[Variable], tolerance: float, rounds: int) -> Search:
    """Golden section along one variable after another, the others at their best, from the middle of all ranges.

    Ends when no variable moves further than the tolerance in a whole round.
    """
    best = [0.5] * len(variables)
    for _ in range(rounds):
        before = list(best)
        for index in range(len(variables)):
            best[index] = yield from _golden(_along(variables, best, index), tolerance)
        if all(abs(new - old) <= tolerance for new, old in zip(best, before, strict=True)):
            return


def _along(variables: Sequence[Variable], best: Sequence[float], index: int) -> Callable[[float], list[float]]:
    fixed = list(best)

    def point(share: float) -> list[float]:
        shares = [*fixed[:index], share, *fixed[index + 1 :]]
        return [variable.at(one) for variable, one in zip(variables, shares, strict=True)]

    return point


def _golden(point: Callable[[float], list[float]], tolerance: float) -> Generator[list[float], float, float]:
    """Returns the share that scored best."""
    low, high = 0.0, 1.0
    left, right = high - _GOLDEN, low + _GOLDEN
    at_left = yield point(left)
    at_right = yield point(right)
    while high - low > tolerance:
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = yield point(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = yield point(right)
    return left if at_left >= at_right else right


def evolution(variables: Sequence[Variable], seed: int) -> Search:
    """CMA-ES (Hansen, arXiv:1604.00772) on ranges scaled to [0, 1], from the middle with a spread of a quarter."""
    cma = importlib.import_module("cma")
    settings = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9, "verb_log": 0, "verb_disp": 0}
    evolved = cma.CMAEvolutionStrategy([0.5] * len(variables), 0.25, settings)
    while not evolved.stop():
        generation = evolved.ask()
        losses = []
        for shares in generation:
            score = yield [variable.at(float(share)) for variable, share in zip(variables, shares, strict=True)]
            losses.append(-score)
        finite = [loss for loss in losses if math.isfinite(loss)]
        worst = max(finite, default=0.0)
        evolved.tell(generation, [loss if math.isfinite(loss) else worst + 1.0 for loss in losses])
