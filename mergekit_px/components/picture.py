"""The picture beside a spectral report: spectra, energy kept, and each source's share of the pools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SPECTRA = 12
"""Matrices whose spectra are drawn: evenly spread over the model."""


def draw(report: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a report made by ``spectral_report``; None where matplotlib is not installed. Raises ``OSError``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = report["tensors"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    spectra, energy, shares = figure.subplots(1, 3)
    step = max(1, len(rows) // _SPECTRA)
    for row in rows[::step]:
        values = row["merged"]["spectrum"]
        spectra.plot(range(1, len(values) + 1), values, linewidth=1, label=row["tensor"])
    spectra.set(title="spectra of the merge", xlabel="component", ylabel="singular value")
    if any(value > 0 for row in rows for value in row["merged"]["spectrum"]):
        spectra.set_yscale("log")
    places = range(len(rows))
    for number, source in enumerate(report["sources"]):
        energy.plot(places, [row["sources"][number]["energy_kept"] for row in rows], ".-", linewidth=1, label=source)
    energy.set(title=f"energy in the first {report['settings']['top_k']}", xlabel="matrix", ylim=(0, 1.05))
    energy.legend(fontsize=7)
    bottom = [0.0] * len(rows)
    for number, source in enumerate(report["sources"]):
        part = [row["sources"][number]["pool_share"] for row in rows]
        shares.bar(places, part, bottom=bottom, label=source, width=0.9)
        bottom = [low + high for low, high in zip(bottom, part, strict=True)]
    shares.set(title="shares of the pool", xlabel="matrix", ylim=(0, 1.05))
    figure.savefig(path, dpi=110)
    return path
