"""Heat maps as a picture, for ``pxmerge compare --picture``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_px.inspection.heat_map import HeatMap, heat_map

_COLOURS = {"sequential": "cividis", "diverging": "PuOr"}
"""Colour maps that stay apart for the colour-blind."""
_CELL = 0.17  # inches
_NAMES = 2.6  # inches for the names of modules


def comparison_maps(comparison: Mapping[str, Any]) -> list[HeatMap]:
    """Relative change and cosine of each model, and how models disagree, for each stack of layers."""
    stacks = dict.fromkeys(cell["stack"] for cell in comparison["layers"] if cell["layer"] is not None)
    return [grid for stack in stacks for grid in _of_stack(comparison, stack) if grid is not None]


def draw_heat_maps(title: str, grids: Sequence[HeatMap], path: Path) -> None:
    """Draw grids below one another, each with its scale beside it. Raises ``OSError``, ``ImportError``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_CELL * len(grid.rows) + 0.9 for grid in grids]
    width = _NAMES + 1.6 + max(6.0, _CELL * max(len(grid.columns) for grid in grids))
    figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, grid in zip(axes, grids, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in grid.values]
        each.set_facecolor("0.85")
        image = each.imshow(values, cmap=_COLOURS[grid.scale], vmin=grid.low, vmax=grid.high, aspect="auto")
        each.set_title(f"{grid.measure}: {grid.of}" if grid.of else grid.measure, loc="left", fontsize=10)
        each.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
        step = max(1, len(grid.columns) // 16)
        each.set_xticks(range(0, len(grid.columns), step), grid.columns[::step], fontsize=7)
        each.set_xlabel("layer", fontsize=8)
        figure.colorbar(image, ax=each, pad=0.01).ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _of_stack(comparison: Mapping[str, Any], stack: str) -> Iterator[HeatMap | None]:
    cells = [cell for cell in comparison["layers"] if cell["stack"] == stack]

    def grid(measure: str, values: Sequence[float | None], **kind: Any) -> HeatMap | None:
        places = zip(cells, values, strict=True)
        return heat_map(measure, ((cell["module"], cell["layer"], value) for cell, value in places), **kind)

    for place, model in enumerate(comparison["models"]):
        yield grid("relative change", [cell["models"][place]["relative"] for cell in cells], of=model)
    if len(comparison["models"]) > 1:
        yield grid("sign conflicts", [cell["sign_conflicts"] for cell in cells], limits=(0.0, 1.0))
    for first in range(len(comparison["models"])):
        for second in range(first):
            names = f"{comparison['models'][second]}, {comparison['models'][first]}"
            cosines = [cell["delta_cosines"][first][second] for cell in cells]
            yield grid("cosine of the differences", cosines, of=names, limits=(-1.0, 1.0))
