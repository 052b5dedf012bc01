"""What a merge changed, by layer and module, measured on the tensors that its plan read and on those it wrote.

With ``b`` a tensor of the base, ``s_i`` of the sources, ``m`` of the merge, ``d_i = s_i - b`` and ``d = m - b``: all
measures follow from the products of these differences, which add up over tensors. Where there is no base, the tensors
themselves stand in the place of the differences. Everything is read in pieces, and summed in float64.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np
import torch

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.declare.document import Document
from mergekit_px.errors import InputError
from mergekit_px.execute.run import plan_checkpoints
from mergekit_px.execute.views import Values, ViewValues, stored_factors
from mergekit_px.inspection.compare import Difference, difference_of
from mergekit_px.kernels.workers import workers
from mergekit_px.plan.layers import Place, expert_of, place_of
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.nodes import Adapted, Apply, Node, Read
from mergekit_px.plan.views import stored_view

_ELEMENTS = 1 << 18
"""Elements of each model in memory at a time."""
_MERGE = ""
"""The name of the merge among readers; no input has it."""
_NAMED = 20
"""Tensors listed by the size of their change."""


class SourceChange(Document):
    """One source beside the merge.

    Attributes:
        cosine: of the source's change and the merge's; of the tensors themselves without a base.
        distance: from the merge to the source, as a share of the source's own change.
        weight: of the source in the weighted sum of the sources' changes that is nearest to the merge's.
        share: of the merge's squared change that the source has in that sum.
    """

    cosine: float | None
    distance: float | None
    weight: float | None
    share: float | None


class Change(Document):
    """What became of some tensors; None where a measure has no meaning.

    Attributes:
        relative: norm of the merge's change as a share of the base's norm.
        energy: squared norm of the merge's change over the mean of those of the sources' changes.
        sign_conflicts: share of the elements which any source changes and on which two disagree in sign.
        explained: share of the merge's squared change that the nearest weighted sum of the sources' explains.
        sources: in the order of the report's sources.
    """

    tensors: int
    elements: int
    relative: float | None
    energy: float | None
    sign_conflicts: float | None
    explained: float | None
    sources: list[SourceChange]


class CellChange(Change):
    """The tensors of one module in one layer, or of one expert in one layer.

    Attributes:
        stack: what the names of the layers begin with; empty outside of layers.
        module: what they go on with; ``*`` for the number of an expert. ``expert 7`` in the list of experts.
        layer: None outside of layers.
    """

    stack: str
    module: str
    layer: int | None


class TensorChange(Document):
    """A tensor by the size of its change."""

    name: str
    relative: float


class Changes(Document):
    """What a merge changed.

    Attributes:
        base: the input that changes are taken from, or ``mean of the sources``; None where there is none.
        sources: inputs beside the base, in the order of the recipe.
        cells: by layer and module, in the order of the model.
        experts: by layer and expert, where tensors of numbered experts are stored one by one.
        most_changed: the tensors with the largest relative change.
        unmeasured: tensor -> why it is not in the sums.
    """

    base: str | None
    sources: list[str]
    total: Change
    cells: list[CellChange]
    experts: list[CellChange]
    most_changed: list[TensorChange]
    unmeasured: dict[str, str]


@dataclass
class _Sums:
    difference: Difference
    tensors: int = 0
    elements: int = 0

    def add(self, difference: Difference, elements: int) -> None:
        self.difference.add(difference)
        self.tensors += 1
        self.elements += elements


@dataclass(frozen=True)
class _Operands:
    """What one tensor of the merge is made of; a source that is missing has no change there."""

    base: Node | None
    sources: Mapping[str, Node]


@dataclass
class _Reader:
    """Elements of nodes and of the merge, in float64."""

    values: ViewValues
    merged: Checkpoint
    plan: Plan
    offered: dict[str, Mapping[str, Node]] = field(default_factory=dict)

    def stored(self, label: str, item: WorkItem) -> Node | None:
        """What an input offers under the name of a tensor of the merge."""
        if label not in self.offered:
            self.offered[label] = stored_view(self.plan.inputs[label]).nodes
        node = self.offered[label].get(item.name)
        return node if node is not None and node.shape == item.shape and node.dtype.arithmetic else None


def measure_changes(
    plan: Plan, merged: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Changes:
    """Measure a merge against what its plan made it of.

    Args:
        plan: its inputs on this machine.
        merged: what carrying it out gave.
        progress: called with bytes of the merge done and bytes in all.

    Raises:
        InputError: a tensor that cannot be read, or a merge that lacks one of the plan's.
    """
    operands = {item.name: _operands(item) for item in plan.items}
    bases = [label for each in operands.values() if each.base is not None and (label := _label(each.base))]
    base = max(dict.fromkeys(bases), key=bases.count) if bases else None
    named = {label for each in operands.values() for label in each.sources} - {base}
    sources = [name for name in plan.inputs if name in named] + sorted(named - set(plan.inputs))
    total = _Sums(Difference.zero(len(sources) + 1))
    cells: dict[Place, _Sums] = {}
    experts: dict[Place, _Sums] = {}
    largest: list[tuple[float, str]] = []
    unmeasured: dict[str, str] = {}
    sizes = {item.name: item.elements * item.dtype.bits // 8 for item in plan.items}
    total_bytes, done = sum(sizes.values()), 0
    with ExitStack() as stack:
        reader = _open(plan, merged, stack)
        pool = stack.enter_context(workers())
        for item in plan.items:
            done += sizes[item.name]
            reason = _unmeasured(item, merged)
            if reason is None:
                found = _completed(operands[item.name], item, base, sources, reader)
                reason = "it has no counterpart in the base" if base is not None and found.base is None else None
            if reason is not None:
                unmeasured[item.name] = reason
                continue
            sums = _measured(item, found, sources, reader, pool)
            total.add(sums, item.elements)
            place = place_of(item.name)
            cells.setdefault(place, _zero(sources)).add(sums, item.elements)
            expert = expert_of(item.name)
            if expert is not None:
                numbered = Place(place.stack, f"expert {expert}", place.layer)
                experts.setdefault(numbered, _zero(sources)).add(sums, item.elements)
            relative = sums.of(len(sources))["relative"] if base is not None else None
            if relative is not None:
                largest.append((relative, item.name))
            progress(done, total_bytes)
    nodes = [node for each in operands.values() for node in each.sources.values()]
    has_changes = base is not None or all(node.kind == "delta" for node in nodes)
    return Changes(
        base=base,
        sources=sources,
        total=Change(**_change(total, has_changes)),
        cells=_cells(cells, has_changes),
        experts=_cells(dict(sorted(experts.items(), key=lambda entry: _expert_order(entry[0]))), has_changes),
        most_changed=[
            TensorChange(name=name, relative=relative)
            for relative, name in heapq.nlargest(_NAMED, largest, key=lambda entry: entry[0])
        ],
        unmeasured=unmeasured,
    )


def _operands(item: WorkItem) -> _Operands:
    """The base of the last method that has one, and what the methods merge: inputs as they are offered."""
    base: Node | None = None
    sources: dict[str, Node] = {}
    pending: list[Node] = [item.node]
    while pending:
        node = pending.pop(0)
        if isinstance(node, Apply):
            base = _readable(node.base) if base is None else base
            pending += node.sources[: len(node.source_indices)]
        else:
            sources.setdefault(_label(node), node)
    return _Operands(base, sources)


def _readable(base: Node | None) -> Node | None:
    """A base whose elements can be made block by block: of an earlier step's result, that step's own base."""
    while isinstance(base, Apply) and not _is_mean(base):
        base = base.base
    return base


def _is_mean(node: Apply) -> bool:
    plain = node.method.statistics is None and node.access == "elementwise" and node.base is None
    return plain and not any(isinstance(source, Apply) for source in node.sources)


def _label(node: Node) -> str:
    """The input that a node is of."""
    if isinstance(node, Apply):
        return "mean of the sources"
    if isinstance(node, Adapted):
        return node.input
    if isinstance(node, Read):
        return node.model
    return "+".join(dict.fromkeys(_label(operand) for operand in node.operands))


def _open(plan: Plan, merged: Checkpoint, stack: ExitStack) -> _Reader:
    checkpoints = {**plan_checkpoints(plan), _MERGE: merged}
    readers = {name: stack.enter_context(closing(open_reader(one))) for name, one in checkpoints.items()}
    return _Reader(ViewValues(readers, stored_factors(readers), plan.seed, torch.float64), merged, plan)


def _unmeasured(item: WorkItem, merged: Checkpoint) -> str | None:
    """Why a tensor is not measured; None if it is."""
    stored = merged.tensors.get(item.name)
    if stored is None or stored.shape != item.shape:
        raise InputError(f"it has no {item.name} of shape {list(item.shape)}", where=merged.label)
    if not item.dtype.arithmetic:
        return f"{item.dtype.name} values are copied, not merged"
    return None if item.elements else "it is empty"


def _completed(
    found: _Operands, item: WorkItem, base: str | None, sources: Sequence[str], reader: _Reader
) -> _Operands:
    """The operands, and what the other inputs have under that name; a tensor may be taken from one of them whole."""
    if any(step.slices for step in reader.plan.loaded.recipe.steps.values()):
        return found  # A name stands for another layer there.
    reference = found.base
    if reference is None and base is not None and base in reader.plan.inputs:
        reference = reader.stored(base, item)
    others = {name: reader.stored(name, item) for name in sources if name not in found.sources}
    others = {name: node for name, node in others.items() if name in reader.plan.inputs}
    return _Operands(reference, {**found.sources, **{name: node for name, node in others.items() if node is not None}})


def _measured(item: WorkItem, found: _Operands, sources: Sequence[str], reader: _Reader, pool: Executor) -> Difference:
    merge = Read(_MERGE, reader.merged.tensors[item.name], item.shape, reader.plan.kind)
    nodes: list[Node | None] = [found.base, *(found.sources.get(name) for name in sources), merge]
    elements = [None if node is None else reader.values.values(node) for node in nodes]

    def measured(piece: tuple[int, int]) -> Difference:
        start, stop = piece
        base = torch.zeros(stop - start, dtype=torch.float64) if elements[0] is None else elements[0](start, stop)
        parts = [_from_base(node, values, base, start, stop) for node, values in zip(nodes, elements, strict=True)]
        return difference_of([base, *parts[1:]], voters=len(sources))

    sums = Difference.zero(len(sources) + 1)
    for part in pool.map(measured, _pieces(item, nodes)):
        sums.add(part)
    return sums


def _from_base(node: Node | None, values: Values | None, base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Full weights: what is a task vector already is added to the base, what is missing is the base."""
    if node is None or values is None:
        return base
    return values(start, stop) + base if node.kind == "delta" else values(start, stop)


def _pieces(item: WorkItem, nodes: Sequence[Node | None]) -> Iterator[tuple[int, int]]:
    """Where a tensor is cut: between rows, and not at all where an operand is made as a whole."""
    row = max(1, math.prod(item.shape[1:]))
    step = max(1, _ELEMENTS // row) * row
    if any(getattr(node, "access", "rows") == "tensor" for node in nodes):
        step = item.elements
    for start in range(0, item.elements, step):
        yield start, min(start + step, item.elements)


def _zero(sources: Sequence[str]) -> _Sums:
    return _Sums(Difference.zero(len(sources) + 1))


def _cells(sums: Mapping[Place, _Sums], has_changes: bool) -> list[CellChange]:
    return [
        CellChange(stack=place.stack, module=place.module, layer=place.layer, **_change(one, has_changes))
        for place, one in sums.items()
    ]


def _expert_order(place: Place) -> tuple[str, int, int]:
    return place.stack, int(place.module.split()[-1]), -1 if place.layer is None else place.layer


def _change(sums: _Sums, has_changes: bool) -> dict[str, object]:
    """The measures, from the products of the differences; ``has_changes``: those are changes, not whole tensors."""
    difference = sums.difference
    count = len(difference.squares) - 1
    gram = np.array(difference.gram)
    energies, energy, products = gram.diagonal()[:count], gram[count, count], gram[:count, count]
    known = bool(np.isfinite(gram).all())
    weights = np.zeros(count)
    if known and count:
        weights = np.linalg.lstsq(gram[:count, :count], products, rcond=1e-10)[0]
    cosines = [row[count] for row in difference.delta_cosines()[:count]]
    mean = float(energies.mean()) if count else 0.0
    return {
        "tensors": sums.tensors,
        "elements": sums.elements,
        "relative": difference.of(count)["relative"] if has_changes else None,
        "energy": _ratio(energy, mean) if has_changes else None,
        "sign_conflicts": difference.sign_conflicts() if has_changes and count > 1 else None,
        "explained": _ratio(float(weights @ products), energy) if count else None,
        "sources": [
            SourceChange(
                cosine=cosines[place],
                distance=_ratio(energy - 2 * products[place] + energies[place], energies[place], root=True),
                weight=float(weights[place]) if known and energies[place] > 0 else None,
                share=_ratio(weights[place] * products[place], energy),
            )
            for place in range(count)
        ],
    }


def _ratio(part: float, whole: float, *, root: bool = False) -> float | None:
    if not (math.isfinite(part) and math.isfinite(whole) and whole > 0):
        return None
    return math.sqrt(max(part, 0.0) / whole) if root else float(part / whole)
