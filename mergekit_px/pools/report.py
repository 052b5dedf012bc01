"""What a spectral merge does to each matrix, as a JSON document and a picture."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mergekit_px._version import __version__
from mergekit_px.errors import UsageError, WriteError
from mergekit_px.kernels.spectral_report import matrix_report
from mergekit_px.methods.declare import Operands
from mergekit_px.methods.matrices import component_count, cut_into_matrices
from mergekit_px.pictures.curves import Curves, curves
from mergekit_px.pictures.drawing import draw
from mergekit_px.pictures.heat_map import HeatMap, heat_map
from mergekit_px.plan.layers import place_of
from mergekit_px.plan.model import Plan
from mergekit_px.pools.deltas import Merge, merges_of, open_deltas


def spectral_report(
    plan: Plan, sources: Sequence[str], advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Spectra, energy kept, shares of the pool, interference and alignment of every matrix of a plan's svd step.

    The sources are read again, and the merge is computed again to be looked at.

    Args:
        plan: of one svd step, its inputs on this machine.
        sources: a label for each source.
        advance: told of bytes done and bytes in all, as one source has them.

    Raises:
        PlanError, NonFiniteError: as a merge.
    """
    merges = [one for one in merges_of(plan) if cut_into_matrices(one.item.shape, one.name, one.params) is not None]
    if not merges:
        raise UsageError("no tensor is merged as a matrix, so there is nothing to report")
    rows: list[dict[str, Any]] = []
    done = 0
    with open_deltas(plan) as reader:
        for one in merges:
            assert one.node is not None
            operands = reader.operands(one.node, one.item)
            rows += _rows(one, operands, one.node.method(operands), sources)
            done += one.nbytes
            advance(done, sum(each.nbytes for each in merges))
    return {
        "pxmerge": __version__,
        "method": "svd",
        "sources": list(sources),
        "settings": merges[0].params.model_dump(mode="json"),
        "pool_share": _shares(rows, len(sources)),
        "interference": sum(row["interference"] for row in rows),
        "tensors": rows,
    }


def write_report(path: Path, report: dict[str, Any]) -> Path | None:
    """Write the document, and a picture beside it where matplotlib is installed; returns the picture's path.

    Raises:
        WriteError: the disk refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return draw_report(report, path.with_suffix(".png"))
    except OSError as error:
        raise WriteError(f"the report cannot be written: {error.strerror or error}", where=str(path)) from error


class _Views(Sequence[torch.Tensor]):
    """One matrix of each source's weighted delta, made when asked for."""

    def __init__(self, operands: Operands, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._operands = operands
        self._view = view

    def __len__(self) -> int:
        return len(self._operands.tensors)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._view(self._operands.tensors[index]) * self._operands.weights[index]


def _rows(one: Merge, operands: Operands, merged: torch.Tensor, sources: Sequence[str]) -> list[dict[str, Any]]:
    views = cut_into_matrices(one.item.shape, one.name, one.params) or []
    rows: list[dict[str, Any]] = []
    for number, view in enumerate(views):
        matrix = view(merged)
        rank = min(matrix.shape)
        rows.append(
            matrix_report(
                one.name if len(views) == 1 else f"{one.name}[{number}]",
                _Views(operands, view),
                sources,
                components=min(rank, component_count(one.params.top_k, rank)),
                merged=matrix,
                base=None if operands.base is None else view(operands.base),
            )
        )
    return rows


def _shares(rows: Sequence[dict[str, Any]], count: int) -> list[float]:
    """Each source's share of the pools, by the mean over matrices."""
    return [math.fsum(row["sources"][place]["pool_share"] for row in rows) / len(rows) for place in range(count)]


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
