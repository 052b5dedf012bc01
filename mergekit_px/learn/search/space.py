"""What is searched: keys of a recipe, and the values that they may have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_px.errors import UsageError

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
