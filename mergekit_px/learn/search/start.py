"""Where a search begins: points that are tried first, of an earlier search or as given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.search.objectives import Objective
from mergekit_px.learn.search.space import Variable, as_written
from mergekit_px.learn.search.trials import Values, is_log, read_log
from mergekit_px.small_files import read_small_file

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
