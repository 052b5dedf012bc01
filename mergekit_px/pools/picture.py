"""The picture beside a spectral report: energy, shares, alignment and interference by layer and module, and spectra."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mergekit_px.pictures.curves import Curves, curves
from mergekit_px.pictures.drawing import draw
from mergekit_px.pictures.heat_map import HeatMap, heat_map
from mergekit_px.plan.places import place_of

_SHARES = (0.0, 1.0)
_MEASURES = {
    "energy_kept": "energy in the first components",
    "pool_share": "share of the pool",
    "alignment": "alignment with the merge (SAR)",
}


def draw_report(report: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a report made by ``spectral_report``; None where matplotlib is not installed. Raises ``OSError``."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    count = report["settings"]["top_k"]
    title = f"{report['method']} of {', '.join(report['sources'])}, top-k {count}"
    draw(title, [one for one in _pictures(report) if one is not None], path)
    return path


def _pictures(report: Mapping[str, Any]) -> Iterator[HeatMap | Curves | None]:
    rows = report["tensors"]
    places = [place_of(row["tensor"]) for row in rows]
    modules: dict[str, list[list[float]]] = {}
    for place, row in zip(places, rows, strict=True):
        modules.setdefault(place.module, []).append(row["merged"]["spectrum"])
    spectra = {name: _median(each) for name, each in modules.items()}
    yield curves("singular values of the merge, median of the layers, as a share of the largest", "component", spectra)
    for stack in dict.fromkeys(place.stack for place in places if place.layer is not None):
        cells = [(place, row) for place, row in zip(places, rows, strict=True) if place.stack == stack]

        def grid(measure: str, values: Sequence[float | None], **kind: Any) -> HeatMap | None:
            pairs = zip(cells, values, strict=True)  # noqa: B023  # used within the round
            return heat_map(measure, ((place.module, place.layer, value) for (place, _), value in pairs), **kind)

        yield grid("interference (STI, relative)", [row["interference_relative"] for _, row in cells])
        edges = [row["noise_edge"] and _over(row["merged"]["spectrum"], row["noise_edge"]) for _, row in cells]
        yield grid("components above the noise edge of rounding, share", edges, limits=_SHARES)
        for key, measure in _MEASURES.items():
            for number, source in enumerate(report["sources"]):
                yield grid(measure, [row["sources"][number][key] for _, row in cells], of=source, limits=_SHARES)


def _median(spectra: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    shares = [[value / values[0] for value in values] for values in spectra if values and values[0] > 0]
    longest = max(map(len, shares), default=0)
    return [
        (number + 1, median(values[number] for values in shares if len(values) > number)) for number in range(longest)
    ]


def _over(values: Sequence[float], edge: float) -> float:
    return sum(value > edge for value in values) / len(values) if values else 0.0
