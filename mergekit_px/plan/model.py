"""What was decided: a frozen plan that can be printed, compared and hashed.

Each output tensor is a :class:`WorkItem` with an expression over stored tensors. Nothing in a plan depends on the
number of threads, the memory budget or the device, except :class:`Budget`, which is left out of the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.layout import OutputLayout
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import PlanError
from mergekit_px.methods.declare import Access, Method, Params
from mergekit_px.plan.peak import Budget
from mergekit_px.plan.rows import Indices, RowTable
from mergekit_px.storage.encoding import Encoding

if TYPE_CHECKING:
    from mergekit_px.adapters.patch import Patch
    from mergekit_px.plan.artefacts import Artefact
    from mergekit_px.plan.inputs import ResolvedInput
    from mergekit_px.plan.options import PlanOptions
    from mergekit_px.recipe.loaded import LoadedRecipe

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


View = Rows | RowMixture | RowMean | Decoded
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


@dataclass(frozen=True, eq=False)
class WorkItem:
    """One output tensor: its storage and the expression that gives its value."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    node: Node

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def action(self) -> Literal["merge", "copy", "convert"]:
        if not isinstance(self.node, Read):
            return "merge"
        return "copy" if self.node.dtype == self.dtype else "convert"

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The distinct nodes of the expression, operands first."""
        return tuple(walk(self.node))

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The stored tensors that the expression reads, each once."""
        return tuple(node for node in self.nodes if isinstance(node, Read))

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Where its evaluation ends: stored tensors, and views of others."""
        return tuple(node for node in walk(self.node, into_views=False) if isinstance(node, Leaf))

    @cached_property
    def views(self) -> tuple[View, ...]:
        """The outermost views of the expression."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, View))

    @cached_property
    def applied(self) -> tuple[Apply, ...]:
        """The methods of the expression, inner ones first."""
        return tuple(node for node in self.nodes if isinstance(node, Apply))

    @cached_property
    def adapted(self) -> tuple[Adapted, ...]:
        """The adapters of the expression, inner ones first."""
        return tuple(node for node in self.nodes if isinstance(node, Adapted))

    @cached_property
    def factor_bytes(self) -> int:
        """Bytes of the adapters' tensors that the expression needs."""
        return sum(node.factor_bytes for node in self.adapted)

    @cached_property
    def wide(self) -> bool:
        """Whether it is computed in float64: an input is float64, or a method of the expression asks for it."""
        asked = any(getattr(node.params, "precision", None) == "float64" for node in self.applied)
        return asked or any(read.dtype.name == "F64" for read in self.reads)

    @cached_property
    def access(self) -> Access:
        """The finest cut that every part of the expression allows."""
        found = {node.access for node in (*self.applied, *self.adapted, *self.views)}
        order: tuple[Access, ...] = ("tensor", "rows", "two_pass", "elementwise")
        return next((access for access in order if access in found), "elementwise")


@dataclass(frozen=True, slots=True)
class Dropped:
    """An input tensor that is not in the output, and why."""

    input: str
    tensor: str
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that a run does, fixed before a weight is read."""

    def __repr__(self) -> str:
        kind = "task vector" if self.kind == "delta" else "model"
        where = "memory" if self.output is None else str(self.output)
        return f"<Plan: {kind} of {len(self.items)} tensors from {', '.join(self.inputs)} -> {where}>"

    def _repr_html_(self) -> str:
        from mergekit_px.plan.report import plan_table

        return plan_table(self)

    inputs: Mapping[str, ResolvedInput]
    items: tuple[WorkItem, ...]
    artefacts: tuple[Artefact, ...]
    """Small files that parameters name, as they were read."""
    layout: OutputLayout
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    config_notes: tuple[str, ...]
    """Those of the notes that are about the config and what is copied beside the weights."""
    config: Mapping[str, Any] | None
    part_configs: Mapping[str, Mapping[str, Any]]
    """Of a model in several folders, the configs that are not copied as they are; path -> content."""
    side_files: Mapping[str, str]
    """File name -> the input that it is copied from."""
    left_behind: Mapping[str, str]
    """What the config's donor has beside its weights and is not copied -> why."""
    config_from: str | None
    tokenizer_from: str | None
    texts: Mapping[str, bytes]
    """What is written beside the weights and is no input's own file: the files of a tokenizer that was built."""
    output: Path | None
    kind: Kind
    seed: int
    steps: Mapping[str, Any]
    """For people: what each step does, as ``pxmerge plan`` and the model card tell it."""
    budget: Budget
    device: str
    loaded: LoadedRecipe = field(repr=False)
    options: PlanOptions = field(repr=False)

    @property
    def bytes_read(self) -> int:
        """Bytes of input that one pass reads (methods with statistics read some tensors again)."""
        return sum(item.factor_bytes + sum(read.tensor.nbytes for read in item.reads) for item in self.items)

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.layout.shards)

    @cached_property
    def hash(self) -> str:
        """sha256 over the inputs, every expression and the output's layout: what a resumed run must share."""
        digest = hashlib.sha256()

        def put(value: Any) -> None:
            digest.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
            digest.update(b"\n")

        put([self.seed, self.kind, self.options.allow_nonfinite])
        for name, source in sorted(self.inputs.items()):
            put([name, source.identity()])
        hashes = {id(artefact.content): artefact.sha256 for artefact in self.artefacts}
        described: dict[int, str] = {}
        for item in self.items:
            put([item.name, item.dtype.name, item.shape, _digest(item.node, described, hashes)])
        for shard in self.layout.shards:
            put([shard.file, hashlib.sha256(shard.header_bytes).hexdigest()])
        return digest.hexdigest()


def _digest(node: Node, known: dict[int, str], artefacts: Mapping[int, str]) -> str:
    """sha256 of an expression, where the contents of artefacts count by their hashes."""
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, Read):
        text = json.dumps([node.input, node.tensor.name, node.shape, node.kind])
    elif isinstance(node, View):
        inner_digests = [_digest(operand, known, artefacts) for operand in node.operands]
        text = json.dumps([node.digest, inner_digests, node.shape, node.dtype.name, node.kind])
    elif isinstance(node, Adapted):
        factors = sorted((role, tensor.name) for role, tensor in node.patch.factors.items()) if node.patch else None
        inner = None if node.base is None else _digest(node.base, known, artefacts)
        text = json.dumps([node.input, node.number, factors, inner, node.kind, node.shape])
    else:
        files = node.method.artefact_fields()
        text = json.dumps(
            [
                node.method.name,
                node.params.model_dump(mode="json", exclude=set(files)),
                [artefacts.get(id(getattr(node.params, name))) for name in files],
                node.weights,
                node.source_indices,
                node.kind,
                None if node.base is None else _digest(node.base, known, artefacts),
                [_digest(source, known, artefacts) for source in node.sources],
            ],
            sort_keys=True,
        )
    known[id(node)] = hashlib.sha256(text.encode()).hexdigest()
    return known[id(node)]
