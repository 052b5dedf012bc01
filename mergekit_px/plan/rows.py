"""Rows made anew: gathered in another order, mixed of rows of several tensors, and the mean of many."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_px.errors import PlanError

if TYPE_CHECKING:
    from mergekit_px.checkpoint.dtypes import DType
    from mergekit_px.methods.declare import Access
    from mergekit_px.plan.model import Kind, Node

Indices = np.ndarray[Any, np.dtype[np.int64]]


class _RowView:
    """What views of rows share: they are of their operands' width, kind and dtype."""

    __slots__ = ()

    @property
    def operands(self) -> tuple[Node, ...]:
        raise NotImplementedError

    @property
    def rows(self) -> int:
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        return self.operands[0].kind

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.operands[0].shape[1:])

    @property
    def dtype(self) -> DType:
        return self.operands[0].dtype

    @property
    def access(self) -> Access:
        return "tensor" if any(getattr(node, "access", "rows") == "tensor" for node in self.operands) else "rows"


@dataclass(frozen=True, slots=True, eq=False)
class Rows(_RowView):
    """Rows of an operand in another order: row ``i`` is row ``index[i]`` of the operand, and zeros where that is -1.

    ``Rows(operand, index)`` is all that is needed: ``index`` is a numpy array of whole numbers, as long as the result
    is to have rows; a row may be taken more than once. The operand is what an input offers (a stored tensor, a decoded
    or an adapted one), never a step's result. It is read in blocks, by runs of neighbouring rows.

    Raises:
        PlanError: an index outside the operand.
    """

    operand: Node
    index: Indices

    def __post_init__(self) -> None:
        rows = self.operand.shape[0] if self.operand.shape else 0
        if self.index.ndim != 1 or (self.index.size and not (self.index.min() >= -1 and self.index.max() < rows)):
            raise PlanError(f"rows are gathered from {list(self.operand.shape)} by an index that does not fit it")

    @property
    def operands(self) -> tuple[Node, ...]:
        return (self.operand,)

    @property
    def rows(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.index.astype("<i8").tobytes()).hexdigest()

    def describe(self) -> Any:
        return {"rows": len(self.index), "index": self.digest[:16], "of": self.operand.describe()}


@dataclass(frozen=True)
class RowTable:
    """Which rows make up each row of a mixture: entries ``starts[i]`` to ``starts[i + 1]`` are those of row ``i``.

    Attributes:
        starts: one more than there are rows.
        operand: for each entry, the number of an operand.
        row: for each entry, a row of that operand.
        weight: for each entry, its factor.
    """

    starts: Indices
    operand: np.ndarray[Any, np.dtype[np.int16]]
    row: Indices
    weight: np.ndarray[Any, np.dtype[np.float32]]

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for part, code in ((self.starts, "<i8"), (self.operand, "<i2"), (self.row, "<i8"), (self.weight, "<f4")):
            digest.update(part.astype(code).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class RowMixture(_RowView):
    """Rows that are weighted sums of rows of several operands, as a table says; zeros where it says nothing.

    The operands are what inputs offer, as for :class:`Rows`, and of one width.

    Raises:
        PlanError: a table that does not fit the operands, or operands that do not fit one another.
    """

    sources: tuple[Node, ...]
    table: RowTable

    def __post_init__(self) -> None:
        counts = np.array([node.shape[0] for node in self.sources], dtype=np.int64)
        table = self.table
        fits = not table.row.size or bool(((table.row >= 0) & (table.row < counts[table.operand])).all())
        if not fits or len({node.shape[1:] for node in self.sources}) > 1:
            shapes = [list(node.shape) for node in self.sources]
            raise PlanError(f"rows are mixed of {shapes} by a table that does not fit them")

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.sources

    @property
    def rows(self) -> int:
        return len(self.table.starts) - 1

    @property
    def digest(self) -> str:
        return self.table.digest

    def describe(self) -> Any:
        return {"rows": self.rows, "mixed": self.digest[:16], "of": [node.describe() for node in self.sources]}


@dataclass(frozen=True, slots=True, eq=False)
class RowMean(_RowView):
    """The mean of all rows of an operand, as one row; summed once for a run, block by block."""

    operand: Node

    @property
    def operands(self) -> tuple[Node, ...]:
        return (self.operand,)

    @property
    def rows(self) -> int:
        return 1

    @property
    def digest(self) -> str:
        return "mean of rows"

    def describe(self) -> Any:
        return {"mean of": self.operand.describe()}
