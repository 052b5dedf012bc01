"""What ``pxmerge compare --json`` prints."""

from __future__ import annotations

from mergekit_px.declare.document import Document

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
