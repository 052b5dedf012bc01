"""Measures by layer and module as grids with a scale: what pages and pictures of heat maps are drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

SHADES = 10
"""Shades of a scale beside its lightest; of a diverging one, to either side."""

Scale = Literal["sequential", "diverging"]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A grid of numbers, modules down and layers across.

    Attributes:
        measure: what the numbers are, in a few words.
        of: the model that they are of; empty if of all.
        rows: names of the modules.
        columns: numbers of the layers.
        values: by row and column; None where there is none.
        scale: ``sequential`` from ``low`` to ``high``; ``diverging`` from their middle, zero.
    """

    measure: str
    of: str
    rows: Sequence[str]
    columns: Sequence[int]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float
    scale: Scale

    @property
    def has_gaps(self) -> bool:
        """Whether a cell has no number."""
        return any(value is None for row in self.values for value in row)

    def shade(self, value: float) -> int:
        """How far a value is from the light end of the scale; negative on the negative side."""
        if self.scale == "diverging":
            return round(SHADES * max(-1.0, min(1.0, value / self.high))) if self.high > 0 else 0
        span = self.high - self.low
        return round(SHADES * max(0.0, min(1.0, (value - self.low) / span))) if span > 0 else 0


def heat_map(
    measure: str,
    cells: Iterable[tuple[str, int | None, float | None]],
    *,
    of: str = "",
    limits: tuple[float, float] | None = None,
) -> HeatMap | None:
    """A grid of (module, layer, value); None where no cell has a layer and a value.

    Args:
        limits: the ends of the scale; zero and the largest value if left out. A scale from below zero is diverging.
    """
    known = {(module, layer): value for module, layer, value in cells if layer is not None}
    numbers = [value for value in known.values() if value is not None and math.isfinite(value)]
    if not numbers:
        return None
    rows = list(dict.fromkeys(module for module, _ in known))
    columns = sorted({layer for _, layer in known})
    low, high = limits or (0.0, max(numbers))
    return HeatMap(
        measure=measure,
        of=of,
        rows=rows,
        columns=columns,
        values=[[known.get((module, layer)) for layer in columns] for module in rows],
        low=low,
        high=high,
        scale="diverging" if low < 0 else "sequential",
    )
