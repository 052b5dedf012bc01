"""Heat maps and curves as a picture file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.pictures.curves import Curves
from mergekit_px.pictures.heat_map import HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"sequential": "cividis", "diverging": "PuOr"}
"""Colour maps that stay apart for the colour-blind."""
_CELL = 0.17  # inches
_NAMES = 2.6  # inches for the names of modules
_CURVES = 2.2  # inches up


def draw(title: str, pictures: Sequence[HeatMap | Curves], path: Path) -> None:
    """Draw pictures below one another, each with its scale or legend beside it. Raises ``OSError``, ``ImportError``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [0.9 + (_CELL * len(one.rows) if isinstance(one, HeatMap) else _CURVES) for one in pictures]
    columns = max((len(one.columns) for one in pictures if isinstance(one, HeatMap)), default=0)
    width = _NAMES + 1.6 + max(6.0, _CELL * columns)
    figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, picture in zip(panels, pictures, strict=True):
        if isinstance(picture, HeatMap):
            _heat_map(figure, axes, picture)
        else:
            _lines(axes, picture)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _heat_map(figure: Figure, axes: Axes, grid: HeatMap) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in grid.values]
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap=_COLOURS[grid.scale], vmin=grid.low, vmax=grid.high, aspect="auto")
    axes.set_title(f"{grid.measure}: {grid.of}" if grid.of else grid.measure, loc="left", fontsize=10)
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    step = max(1, len(grid.columns) // 16)
    axes.set_xticks(range(0, len(grid.columns), step), [str(layer) for layer in grid.columns[::step]])
    axes.set_xlabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)


def _lines(axes: Axes, picture: Curves) -> None:
    """Lines differ in colour, in their dashes and in their marks."""
    from matplotlib import colormaps

    colours = colormaps["cividis"]
    for number, (name, points) in enumerate(picture.lines.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=colours(number / max(1, len(picture.lines) - 1) * 0.9),
            linestyle=("-", "--", "-.", ":")[number % 4] if picture.joined else "none",
            marker="osD^v<>p"[number % 8],
            markersize=3,
            linewidth=1,
            label=name,
        )
    if picture.marked is not None:
        place, what = picture.marked
        axes.axvline(place, color="0.4", linestyle=":", linewidth=1, label=what)
    axes.set_title(picture.measure, loc="left", fontsize=10)
    axes.set_xlabel(picture.across, fontsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=8, fontsize=7, frameon=False)
