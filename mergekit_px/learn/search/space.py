"""What is searched: keys of a recipe, the values that they may have, and the points that are tried first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.search.objectives import Objective
from mergekit_px.learn.search.trials import Values, is_log, read_log
from mergekit_px.small_files import read_small_file

_FORMS = "write KEY=LOW:HIGH, KEY=LOW:HIGH:STEP or KEY=A,B,C"
_MOST_VALUES = 10_000


@dataclass(frozen=True, slots=True)
class Variable:
    """One number, and the keys of the recipe that get it.

    Attributes:
        keys: as in ``--set``.
        low, high: its range.
        values: the only ones that it may have; empty for all of the range.
    """

    keys: tuple[str, ...]
    low: float
    high: float
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return ",".join(self.keys)

    def grid(self, points: int) -> tuple[float, ...]:
        """Its own values, or ``points`` of them at equal distances, both ends included."""
        if self.values:
            return self.values
        if points > _MOST_VALUES:
            raise UsageError(f"a range may have {_MOST_VALUES:,} values", where=f"--points {points}")
        return tuple(as_written(self.low + (self.high - self.low) * index / (points - 1)) for index in range(points))

    def at(self, share: float) -> float:
        """The value at a share of the range, 0 for ``low`` and 1 for ``high``."""
        return as_written(self.low + (self.high - self.low) * min(max(share, 0.0), 1.0))

    def share(self, value: float) -> float:
        """Where in the range a value is."""
        return (value - self.low) / (self.high - self.low)

    def takes(self, value: float) -> bool:
        """Whether it may have the value."""
        return value in self.values if self.values else self.low <= value <= self.high


def as_written(value: float) -> float:
    """The number that ten digits say: what the recipe gets, and what the log keeps."""
    return float(f"{value:.10g}")


def parse_variable(text: str) -> Variable:
    """``merge.params.t=0:1``, ``merge.sources.a,merge.sources.b=0:1:0.1`` or ``merge.params.t=0.2,0.4``.

    Raises:
        UsageError: none of these forms, or values that are no finite numbers in rising order.
    """
    left, equals, right = text.rpartition("=")
    keys = tuple(key.strip() for key in left.split(","))
    if not equals or not all(keys):
        raise UsageError("it names no key and range", where=f"--over {text}", hint=_FORMS)
    separator = ":" if ":" in right else ","
    try:
        numbers = [float(word) for word in right.split(separator)]
    except ValueError:
        raise UsageError("its values are not numbers", where=f"--over {text}", hint=_FORMS) from None
    if not all(map(math.isfinite, numbers)):
        raise UsageError("its values are not finite", where=f"--over {text}")
    if separator == ",":
        if len(set(numbers)) < len(numbers):
            raise UsageError("a value is given twice", where=f"--over {text}")
        return Variable(keys, min(numbers), max(numbers), tuple(map(as_written, numbers)))
    low, high = numbers[0], numbers[1]
    if len(numbers) > 3 or not low < high:
        raise UsageError("its range is not LOW:HIGH with LOW below HIGH", where=f"--over {text}", hint=_FORMS)
    return Variable(keys, low, high, _stepped(low, high, numbers[2], text) if len(numbers) == 3 else ())


def _stepped(low: float, high: float, step: float, text: str) -> tuple[float, ...]:
    if step <= 0 or (high - low) / step > _MOST_VALUES:
        raise UsageError(f"a step of {step:g} does not divide its range", where=f"--over {text}")
    count = math.floor((high - low) / step * (1 + 1e-12) + 1e-9)
    return tuple(as_written(low + index * step) for index in range(count + 1))


def overrides(variables: Sequence[Variable], values: Sequence[float]) -> list[str]:
    """What sets a recipe to these values, as ``--set`` takes it."""
    return [f"{key}={value:.10g}" for variable, value in zip(variables, values, strict=True) for key in variable.keys]


BEST_OF_BEFORE = 10
"""Trials of an earlier search that are tried again at most: its best, and each is a merge and a score here."""

_FORM = 'write a line {"merge.sources.a": 0.5, ...} for each point, or give trials.jsonl of a search'


def start_points(path: str, variables: Sequence[Variable], note: Callable[[str], None]) -> list[Values]:
    """Points in the order in which they are tried: as listed, or the best trials of an earlier search, best first.

    Points outside of the ranges are left out, and said to be.

    Raises:
        InputError: neither points nor the log of a search.
        UsageError: a variable that a point lacks, or no point within the ranges.
    """
    place = Path(path).expanduser()
    text = read_small_file(place).decode("utf-8", "replace")
    points = _of_log(place) if is_log(text) else _listed(text, path)
    if not points:
        raise InputError("it holds no points", where=path, hint=_FORM)
    found = [_values(point, variables, path) for point in points]
    inside = [values for values in dict.fromkeys(found) if values is not None]
    left_out = sum(values is None for values in found)
    if not inside:
        raise UsageError(
            "none of its points lies within the ranges of --over",
            where=f"--start-from {path}",
            hint=f"the first has {', '.join(f'{name}={value}' for name, value in points[0].items())[:200]}",
        )
    if left_out:
        note(f"{left_out} of {len(found)} points of {path} are left out: they do not lie within --over")
    return inside


def _of_log(path: Path) -> list[Mapping[str, Any]]:
    """The best trials, by the first objective."""
    head, trials = read_log(path)
    objective = Objective(**head["objectives"][0])
    scored = [trial for trial in trials if trial.values and trial.scores is not None]
    scored.sort(key=lambda trial: (-objective.gain(trial.scores), trial.number))
    return [dict(zip(head["variables"], trial.values, strict=True)) for trial in scored[:BEST_OF_BEFORE]]


def _listed(text: str, path: str) -> list[Mapping[str, Any]]:
    points: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            point = None
        if not isinstance(point, dict):
            raise InputError("no point of a search", where=f"{path}:{number}", hint=_FORM)
        points.append(point)
    return points


def _values(point: Mapping[str, Any], variables: Sequence[Variable], path: str) -> Values | None:
    """Of the variables; None where one does not lie in its range."""
    values = []
    for variable in variables:
        value = point.get(variable.name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            lacking = variable.name not in point
            what = "a point has no value for" if lacking else f"a point has {value!r}, not a finite number, for"
            hint = f"its names are {', '.join(map(str, point))[:200]}" if lacking and point else None
            raise UsageError(f"{what} {variable.name}, which --over searches", where=f"--start-from {path}", hint=hint)
        values.append(as_written(float(value)))
    return tuple(values) if all(map(Variable.takes, variables, values)) else None
