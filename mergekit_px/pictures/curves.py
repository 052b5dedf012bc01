"""Lines or points over one axis, and where on paper they go: traces of training, trials of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TICKS = 6
"""About so many along an axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high`` with numbers at ``ticks``, all finite."""

    low: float
    high: float
    ticks: Sequence[float]

    def share(self, value: float) -> float:
        """How far along a value is, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Curves:
    """Numbers over numbers.

    Attributes:
        measure: what goes up, in a few words.
        across: what goes across.
        lines: name -> its points, in their order.
        joined: whether the points of a line are joined.
        marked: where something was chosen, and what.
    """

    measure: str
    across: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    joined: bool = True
    marked: tuple[float, str] | None = None

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The axis across, and the one up."""
        points = [point for line in self.lines.values() for point in line]
        across = [place for place, _ in points] + ([] if self.marked is None else [self.marked[0]])
        return _axis(across), _axis([value for _, value in points])


def curves(
    measure: str,
    across: str,
    lines: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    joined: bool = True,
    marked: tuple[float, str] | None = None,
) -> Curves | None:
    """Curves of what is finite; None where nothing is."""
    known = {
        name: [(place, value) for place, value in line if value is not None and math.isfinite(value)]
        for name, line in lines.items()
    }
    known = {name: line for name, line in known.items() if line}
    return Curves(measure, across, known, joined, marked) if known else None


def _axis(values: Sequence[float]) -> Axis:
    """An axis that begins and ends at round numbers around the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)
