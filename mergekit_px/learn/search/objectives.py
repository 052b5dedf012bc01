"""What is searched for: numbers that a score gives, which of them shall be high or low, and the trials that no other
beats in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_px.errors import RunError, UsageError
from mergekit_px.located.nearest import hint_for

Metrics = dict[str, float]
"""What a score says of a model, by name; the number of a score that gives one, or its main one, is ``SCORE``."""

SCORE = "score"
BALANCED = "balanced"
_DIRECTIONS = {"min": True, "max": False}


@dataclass(frozen=True, slots=True)
class Objective:
    """Attributes:
    name: of the number.
    minimize: whether less is better; None where it was not said, which means more.
    """

    name: str
    minimize: bool | None = None

    def gain(self, metrics: Mapping[str, float] | None) -> float:
        """The number so that more is better; minus infinity for a failed trial."""
        if metrics is None:
            return -math.inf
        return -metrics[self.name] if self.minimize else metrics[self.name]


def parse_objectives(texts: Sequence[str], *, minimize: bool) -> tuple[Objective, ...]:
    """``accuracy loss:min``; the number of a score that gives one, if nothing is said.

    Raises:
        UsageError: another direction, or a name given twice.
    """
    if not texts:
        return (Objective(SCORE, minimize or None),)
    if minimize:
        raise UsageError("--minimize goes without --objective", hint=f"write {texts[0].partition(':')[0]}:min")
    found = []
    for text in texts:
        name, colon, direction = text.rpartition(":") if text.rpartition(":")[2] in _DIRECTIONS else (text, "", "")
        if not name or ":" in name:
            raise UsageError("an objective is NAME, NAME:min or NAME:max", where=f"--objective {text}")
        found.append(Objective(name, _DIRECTIONS[direction] if colon else None))
    names = [objective.name for objective in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{twice} is given twice", where="--objective")
    return tuple(found)


def require_objectives(metrics: Mapping[str, float], objectives: Sequence[Objective], where: str) -> None:
    """Raise ``RunError`` where a score does not give what is searched for."""
    for objective in objectives:
        if objective.name in metrics:
            continue
        if objective.name == SCORE:
            what = f"it gives several numbers ({', '.join(list(metrics)[:12])}) and none is called {SCORE}"
            raise RunError(what, where=where, hint="say which count: --objective NAME NAME:min")
        hint = hint_for(objective.name, metrics) or "the score gives no numbers"
        raise RunError(f"it gives no number called '{objective.name}'", where=where, hint=hint)


def non_dominated(gains: Sequence[Sequence[float]]) -> list[int]:
    """The places of those that no other equals or exceeds in everything and exceeds in something; of equal ones the
    first alone."""
    front: list[int] = []
    for place, own in enumerate(gains):
        others = (other for number, other in enumerate(gains) if number < place or list(other) != list(own))
        if all(map(math.isfinite, own)) and not any(_covers(other, own) for other in others):
            front.append(place)
    return front


def _covers(other: Sequence[float], own: Sequence[float]) -> bool:
    return all(theirs >= ours for theirs, ours in zip(other, own, strict=True))


def most_balanced(gains: Sequence[Sequence[float]]) -> int:
    """The place nearest to the best of everything, each objective scaled to the range of those given."""
    columns = [(max(column), min(column)) for column in zip(*gains, strict=True)]

    def distance(own: Sequence[float]) -> float:
        shares = ((high - gain) / (high - low) for gain, (high, low) in zip(own, columns, strict=True) if high > low)
        return math.hypot(*shares)

    return min(range(len(gains)), key=lambda place: distance(gains[place]))
