"""What reports draw: numbers of tensors, or of blocks of them, by layer and module, and traces of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_px.learn.declare import Table
from mergekit_px.pictures.curves import Curves, curves
from mergekit_px.pictures.heat_map import HeatMap, heat_map
from mergekit_px.plan.layers import place_of


def by_layer(
    measure: str, values: Mapping[str, Sequence[float | None]], columns: Sequence[str] = ("",)
) -> Iterator[HeatMap | Table | None]:
    """For each stack of layers a heat map of each column, and a table of what is in no layer.

    Where layers have one number for each column, the columns are the rows of one map. Maps have one scale.

    Args:
        values: tensor or block -> a number for each column.
        columns: what the numbers are of.
    """
    places = {name: place_of(name) for name in values}
    numbers = [value for row in values.values() for value in row if value is not None]
    largest = max(map(abs, numbers), default=0.0)
    limits = (-largest if min(numbers, default=0.0) < 0 else 0.0, largest)
    for stack in dict.fromkeys(place.stack for place in places.values() if place.layer is not None):
        cells = [(place.module, place.layer, values[name]) for name, place in places.items() if place.stack == stack]
        if len({module for module, _, _ in cells}) == 1 and len(columns) > 1:
            rows = ((column, layer, row[at]) for at, column in enumerate(columns) for _, layer, row in cells)
            yield heat_map(measure, rows, of=stack, limits=limits)
            continue
        for at, column in enumerate(columns):
            yield heat_map(
                measure, ((module, layer, row[at]) for module, layer, row in cells), of=column, limits=limits
            )
    outside = [name for name, place in places.items() if place.layer is None]
    if outside:
        rows_outside = [
            (name, *(None if value is None else f"{value:.4g}" for value in values[name])) for name in outside
        ]
        yield Table((f"{measure}, outside the layers", *columns), rows_outside)


def traces(
    trace: Sequence[tuple[int, float | None, float]], chosen: int, score: str = "score on the validation data"
) -> Iterator[Curves | None]:
    """The loss and the score of a training run, by step.

    Args:
        trace: step, loss since the entry before, score.
        chosen: the step whose values are the result.
    """
    marked = (float(chosen), "chosen")
    yield curves(
        "loss on the training data", "step", {"loss": [(step, loss) for step, loss, _ in trace]}, marked=marked
    )
    yield curves(score, "step", {"score": [(step, found) for step, _, found in trace]}, marked=marked)
