"""The nodes of expressions: what is read, how views are made of it, which methods and adapters are applied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import PlanError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Access, Method, Params
from mergekit_px.plan.rows import Indices, RowTable
from mergekit_px.storage.encoding import Encoding

if TYPE_CHECKING:
    from mergekit_px.adapters.patch import Patch

Kind = Literal["weights", "delta"]
"""Whether a value is a model's weights or a task vector (a difference of weights)."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A stored tensor of an input; ``shape`` may keep only its first rows."""

    input: str
    tensor: StoredTensor
    shape: tuple[int, ...]
    kind: Kind

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def model(self) -> str:
        """The recipe's name of the input; ``input`` also tells which of its adapters holds the tensor."""
        return self.input.partition("#")[0]

    @property
    def operands(self) -> tuple[Node, ...]:
        return ()

    def describe(self) -> Any:
        return f"{self.input}:{self.tensor.name}"


class _View:
    """What views share: they are of their operands' kind and dtype."""

    __slots__ = ()

    @property
    def operands(self) -> tuple[Node, ...]:
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        return self.operands[0].kind

    @property
    def dtype(self) -> DType:
        return self.operands[0].dtype

    @property
    def access(self) -> Access:
        return finest(self.operands)


class _RowView(_View):
    """Views of rows are of their operands' width too."""

    __slots__ = ()

    @property
    def rows(self) -> int:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.operands[0].shape[1:])

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


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The values of a tensor that is stored in encoded form; ``parts`` are the stored tensors that hold them."""

    encoding: Encoding
    parts: tuple[Read, ...]
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.encoding.shape

    @property
    def dtype(self) -> DType:
        return self.encoding.dtype

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.parts

    @property
    def access(self) -> Access:
        return "rows"

    @property
    def digest(self) -> str:
        return self.encoding.title

    def describe(self) -> Any:
        return {"decoded": self.encoding.title, "of": [part.describe() for part in self.parts]}


@dataclass(frozen=True, slots=True, eq=False)
class Section(_View):
    """Neighbouring elements of an operand, from ``start`` on, as a tensor of their own: one expert of a stack."""

    operand: Node
    start: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.start + math.prod(self.shape) <= math.prod(self.operand.shape):
            raise PlanError(f"{list(self.shape)} from {self.start} on is outside of {list(self.operand.shape)}")

    @property
    def operands(self) -> tuple[Node, ...]:
        return (self.operand,)

    @property
    def digest(self) -> str:
        return f"from {self.start}"

    def describe(self) -> Any:
        return {"from": self.start, "shape": list(self.shape), "of": self.operand.describe()}


@dataclass(frozen=True, slots=True, eq=False)
class Joined(_View):
    """Operands one after another, as one tensor: the experts of a layer in a stack.

    The operands are what inputs offer, or what a method makes of that element by element.
    """

    parts: tuple[Node, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(math.prod(part.shape) for part in self.parts) != math.prod(self.shape):
            raise PlanError(f"{[list(part.shape) for part in self.parts]} do not make {list(self.shape)}")

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.parts

    @property
    def digest(self) -> str:
        return "joined"

    def describe(self) -> Any:
        return {"joined": [part.describe() for part in self.parts]}


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Random numbers, the same on every run with one seed: normal with a deviation, or uniform within a bound."""

    stream: str
    """What they are for; two of one name are the same numbers."""
    shape: tuple[int, ...]
    dtype: DType
    kind: Kind
    distribution: Literal["normal", "uniform"]
    scale: float

    @property
    def operands(self) -> tuple[Node, ...]:
        return ()

    @property
    def access(self) -> Access:
        return "elementwise"

    @property
    def digest(self) -> str:
        return f"{self.distribution} {self.scale} {self.stream}"

    def describe(self) -> Any:
        return {"drawn": self.distribution, "scale": self.scale, "for": self.stream}


def finest(nodes: Iterable[Node]) -> Access:
    """The finest cut that all nodes allow; stored tensors may be cut anywhere."""
    found = {getattr(node, "access", "elementwise") for node in nodes}
    order: tuple[Access, ...] = ("tensor", "rows", "two_pass", "elementwise")
    return next((access for access in order if access in found), "elementwise")


@dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """A method applied to sources.

    For methods on deltas, ``base`` is subtracted from the sources that are weights, and added to the result; where
    it is None all sources are deltas and so is the result.
    """

    step: str
    method: Method
    params: Params
    weights: tuple[float, ...]
    sources: tuple[Node, ...]
    source_indices: tuple[int, ...]
    """Place of each source among the step's sources: the random streams follow it."""
    base: Node | None
    kind: Kind
    shape: tuple[int, ...]
    dtype: DType

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.sources if self.base is None else (self.base, *self.sources)

    @property
    def access(self) -> Access:
        return self.method.access_with(self.params)

    def describe(self) -> Any:
        return {
            "step": self.step,
            "method": self.method.name,
            "params": self.params.model_dump(mode="json"),
            "weights": list(self.weights),
            "sources": [source.describe() for source in self.sources],
            "base": self.base.describe() if self.base is not None else None,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A base tensor changed by an adapter (``weights``), or the change alone (``delta``).

    ``patch`` is None where the adapter leaves the tensor as it is; the change is then zero.
    """

    input: str
    number: int
    """Which of the input's adapters."""
    patch: Patch | None
    base: Node | None
    kind: Kind
    shape: tuple[int, ...]
    dtype: DType

    @property
    def operands(self) -> tuple[Node, ...]:
        return () if self.base is None else (self.base,)

    @property
    def factor_bytes(self) -> int:
        return sum(factor.nbytes for factor in self.patch.factors.values()) if self.patch is not None else 0

    @property
    def access(self) -> Access:
        """Factors are read for every chunk, so a tensor with large ones is taken whole."""
        if self.patch is None:
            return "elementwise"
        large = 4 * self.factor_bytes > math.prod(self.shape) * self.dtype.bits // 8
        return "tensor" if large or self.patch.access == "tensor" else "rows"

    def describe(self) -> Any:
        base = self.base.describe() if self.base is not None else None
        kind = type(self.patch).__name__ if self.patch is not None else None
        return {"adapter": f"{self.input}#{self.number}", "patch": kind, "base": base, "kind": self.kind}


View = Rows | RowMixture | RowMean | Decoded | Section | Joined | Drawn
"""What stands between an input's stored tensors and what it offers; made block by block, like a read."""

Leaf = Read | View
"""Where the evaluation of an expression ends."""

Node = Leaf | Apply | Adapted


def walk(node: Node, *, into_views: bool = True) -> Iterator[Node]:
    """The distinct nodes of an expression, operands before the nodes that use them.

    Args:
        into_views: go on to what views are made of.
    """
    seen: set[int] = set()

    def visit(current: Node) -> Iterator[Node]:
        if id(current) in seen:
            return
        seen.add(id(current))
        if into_views or not isinstance(current, View):
            for operand in current.operands:
                yield from visit(operand)
        yield current

    return visit(node)


def combined(step: str, sources: Sequence[Node], weights: Sequence[float]) -> Apply:
    """A weighted sum of tensors of one shape, of the kind of the first."""
    method = find_method("combine")
    return Apply(
        step=step,
        method=method,
        params=method.params(),
        weights=tuple(weights),
        sources=tuple(sources),
        source_indices=tuple(range(len(sources))),
        base=None,
        kind=sources[0].kind,
        shape=sources[0].shape,
        dtype=sources[0].dtype,
    )


def can_be_cut(node: Node) -> bool:
    """Whether any part of a tensor can be made by itself, so that views may be made of it."""
    methods = (inner for inner in walk(node) if isinstance(inner, Apply))
    return all(one.access == "elementwise" and not one.method.random for one in methods)
