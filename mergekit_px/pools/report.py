"""What a spectral merge does to each matrix, as a JSON document and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_px._version import __version__
from mergekit_px.errors import UsageError, WriteError
from mergekit_px.kernels.spectral_report import matrix_report
from mergekit_px.methods.declare import Operands
from mergekit_px.methods.matrices import component_count, cut_into_matrices
from mergekit_px.plan.model import Plan
from mergekit_px.pools.deltas import Merge, merges_of, open_deltas
from mergekit_px.pools.picture import draw_report


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
