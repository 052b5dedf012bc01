"""What ``pxmerge compare`` prints with ``--json``, and draws with ``--picture``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_px.declare.document import Document
from mergekit_px.pictures.heat_map import HeatMap, heat_map

Cosines = list[list[float | None]]
"""Of each pair of models, or how far each one's difference lies in another's subspace."""


class ModelDifference(Document):
    """How a model differs from the reference; None where a measure has no meaning.

    Attributes:
        difference: norm of the difference; ``relative``: its share of the norm of the reference.
        largest: the largest element of the difference.
        cosine: of the model and the reference.
        identical: whether the bytes are the same.
    """

    difference: float | None
    relative: float | None
    largest: float | None
    cosine: float | None
    identical: bool


class ModelTotal(ModelDifference):
    """Over all tensors."""

    tensors_equal: int
    tensors: int


class _Differences(Document):
    delta_cosines: Cosines | None
    sign_conflicts: float | None


class TotalDifference(_Differences):
    """Over all tensors; with ``--spectral`` also means over matrices."""

    models: list[ModelTotal]
    effective_ranks: list[float | None] | None = None
    alignments: Cosines | None = None


class TensorDifference(_Differences):
    """One tensor."""

    name: str
    shape: list[int]
    dtype: str
    models: list[ModelDifference]
    effective_ranks: list[float | None] | None = None
    alignments: Cosines | None = None


class LayerDifference(_Differences):
    """The tensors of one module in one layer; outside of layers ``layer`` is None."""

    stack: str
    module: str
    layer: int | None
    models: list[ModelDifference]


class MissingTensor(Document):
    """A tensor that some models lack."""

    name: str
    not_in: list[str]


class MismatchedTensor(Document):
    """A tensor of different shapes."""

    name: str
    shapes: list[list[int]]


class ComparisonDocument(Document):
    """How models differ from a reference: in total, by tensor, and by layer and module."""

    reference: str
    models: list[str]
    total: TotalDifference
    tensors: list[TensorDifference]
    layers: list[LayerDifference]
    missing: list[MissingTensor]
    mismatched: list[MismatchedTensor]
    notes: list[str]


def comparison_maps(comparison: Mapping[str, Any]) -> list[HeatMap]:
    """Relative change and cosine of each model, and how models disagree, for each stack of layers."""
    stacks = dict.fromkeys(cell["stack"] for cell in comparison["layers"] if cell["layer"] is not None)
    return [grid for stack in stacks for grid in _of_stack(comparison, stack) if grid is not None]


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
