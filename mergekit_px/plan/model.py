"""What was decided: a frozen plan that can be printed, compared and hashed.

Each output tensor is a :class:`WorkItem` with an expression over stored tensors. Nothing in a plan depends on the
number of threads, the memory budget or the device, except :class:`Budget`, which is left out of the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.checkpoint.dtypes import DType, byte_count
from mergekit_px.checkpoint.layout import OutputLayout, OutputTensor
from mergekit_px.escaping import html_table
from mergekit_px.methods.declare import Access
from mergekit_px.plan.nodes import Adapted, Apply, Kind, Leaf, Node, Read, View, finest, walk
from mergekit_px.storage.encoding import Encodable

if TYPE_CHECKING:
    from mergekit_px.plan.artefacts import Artefact
    from mergekit_px.plan.inputs import ResolvedInput
    from mergekit_px.plan.lock import Lock
    from mergekit_px.plan.options import PlanOptions
    from mergekit_px.recipe.loaded import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Budget:
    """Peak memory, in bytes, as planned.

    ``total = baseline + workers * worker + side_by_side * largest``: the interpreter with its libraries, the buffers
    of each worker, and the largest tensor that a method needs whole, as often as such are worked on at once.
    """

    baseline: int
    workers: int
    worker: int
    largest: int
    largest_tensor: str | None
    chunk: int
    """Elements of a tensor that one worker holds at a time."""
    side_by_side: int = 1
    """How many tensors as large as the largest fit at once."""
    past_cache: bool = False
    """Whether there is room, in the baseline, for bytes on their way past the page cache."""

    @property
    def total(self) -> int:
        return self.baseline + self.workers * self.worker + self.whole

    @property
    def whole(self) -> int:
        """What tensors that are needed whole may occupy together."""
        return self.side_by_side * self.largest


@dataclass(frozen=True, eq=False)
class WorkItem:
    """One output tensor: its storage and the expression that gives its value."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    node: Node
    encoding: Encodable | None = None
    """How it is stored, where that is in encoded form; ``dtype`` is then that of its codes."""

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """What is stored of it, the codes first where it is encoded."""
        if self.encoding is None:
            return (OutputTensor(self.name, self.dtype, self.shape),)
        parts = self.encoding.parts
        return tuple(OutputTensor(part.name, part.dtype, part.shape, together=self.name) for part in parts.values())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all that is stored of it."""
        return sum(byte_count(tensor.dtype, tensor.shape) for tensor in self.tensors)

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def action(self) -> Literal["merge", "copy", "convert"]:
        if not isinstance(self.node, Read) or self.encoding is not None:
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
        found = finest((*self.applied, *self.adapted, *self.views))
        return found if self.encoding is None or found == "tensor" else "rows"


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
        rows = [
            ("result", f"{'task vector' if self.kind == 'delta' else 'model'} of {len(self.items)} tensors"),
            *(("input", f"{name}: {source.reference}") for name, source in self.inputs.items()),
            *(("step", f"{name}: {step['method']}") for name, step in self.steps.items()),
            ("output", str(self.output)),
            ("bytes", f"{self.bytes_read:,} read, {self.bytes_written:,} written"),
            ("peak memory", f"{self.budget.total:,} bytes"),
            *(("note", note) for note in self.notes),
        ]
        return html_table(rows)

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
    """Where it is written; for an address of a store, the folder of this machine that its files go through."""
    store: str | None
    """The address of the output, where it is in a store."""
    kind: Kind
    seed: int
    steps: Mapping[str, Any]
    """For people: what each step does, as ``pxmerge plan`` and the model card tell it."""
    budget: Budget
    device: str
    loaded: LoadedRecipe = field(repr=False)
    published: LoadedRecipe = field(repr=False)
    """The recipe that goes with the result: references to the Hub carry their commits."""
    lock: Lock | None = field(repr=False)
    """What the inputs are pinned by."""
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
            encoded = () if item.encoding is None else (item.encoding.title,)
            put([item.name, item.dtype.name, item.shape, _digest(item.node, described, hashes), *encoded])
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
