"""The picture beside a spectral report: spectra, noise edge, energy, shares, interference and alignment by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SPECTRA = 12
"""Matrices whose spectra are drawn: evenly spread over the model."""
_NAMED = 16
"""With more matrices than these, the axis numbers them."""


def draw(report: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a report made by ``spectral_report``; None where matplotlib is not installed. Raises ``OSError``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows, sources = report["tensors"], report["sources"]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (spectra, edges, energy), (shares, interference, alignment) = figure.subplots(2, 3)
    _spectra(spectra, rows)
    for axes in (edges, energy, shares, interference, alignment):
        _matrices(axes, [row["tensor"] for row in rows])
    _edges(edges, rows)
    energy.set(title=f"energy of each source in its first {report['settings']['top_k']}", ylim=(0, 1.05))
    alignment.set(title="alignment with the merge (SAR)", ylim=(0, 1.05))
    for axes, measure in ((energy, "energy_kept"), (alignment, "alignment")):
        for number, source in enumerate(sources):
            values = [row["sources"][number][measure] for row in rows]
            axes.plot([float("nan") if value is None else value for value in values], ".-", linewidth=1, label=source)
    shares.set(title="shares of the pool", ylim=(0, 1.05))
    bottom = [0.0] * len(rows)
    for number, source in enumerate(sources):
        part = [row["sources"][number]["pool_share"] for row in rows]
        shares.bar(range(len(rows)), part, bottom=bottom, label=source, width=0.9)
        bottom = [low + high for low, high in zip(bottom, part, strict=True)]
    interference.bar(range(len(rows)), [row["interference_relative"] or 0.0 for row in rows], color="0.5")
    interference.set(title="interference (STI, relative)")
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=8, title="sources")
    figure.savefig(path, dpi=110)
    return path


def _spectra(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    step = max(1, len(rows) // _SPECTRA)
    for place in range(0, len(rows), step):
        values = rows[place]["merged"]["spectrum"]
        colour = colormaps["viridis"](place / max(1, len(rows) - 1))
        axes.plot(range(1, len(values) + 1), values, linewidth=1, color=colour)
    axes.set(title="spectra of the merge (first matrix dark)", xlabel="component")
    axes.set_ylabel("singular value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(value > 0 for row in rows for value in row["merged"]["spectrum"]):
        axes.set_yscale("log")


def _edges(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The largest and the smallest singular value of each matrix beside what rounding explains."""
    kept = [[value for value in row["merged"]["spectrum"] if value > 0] for row in rows]
    missing = float("nan")
    axes.plot(
        [values[0] if values else missing for values in kept], ".-", linewidth=1, color="tab:purple", label="largest"
    )
    axes.plot(
        [values[-1] if values else missing for values in kept],
        ".-",
        linewidth=1,
        color="tab:olive",
        label="smallest kept",
    )
    edges = [row["noise_edge"] or missing for row in rows]
    axes.plot(edges, "--", linewidth=1, color="black", label="noise edge")
    axes.set(title="singular values and rounding")
    if any(kept):
        axes.set_yscale("log")
    axes.legend(fontsize=7)


def _matrices(axes: Axes, names: Sequence[str]) -> None:
    """Matrices along the horizontal axis: by name, without what all names begin with, or by number if they are many."""
    from matplotlib.ticker import MaxNLocator

    if len(names) > _NAMED:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("matrix, in the order of the report")
        return
    words = [name.split(".") for name in names]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == words[0][shared] for each in words):
        shared += 1
    labels = [".".join(each[shared:]).removesuffix(".weight") for each in words]
    axes.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=6)
