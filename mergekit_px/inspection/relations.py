"""What the sources of a merge are to one another, measured on exactly what the merge would combine.

The operands come from a plan: names are bridged, encoded values decoded, tokens in one order, and adapters stand for
their change alone. Everything is read once, in pieces; a sample of matrices is held whole and decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_elements
from mergekit_px.errors import NonFiniteError
from mergekit_px.inspection.compare import Difference, compare_tensor
from mergekit_px.inspection.compare_spectra import mean_alignment, mean_spectra, spectra
from mergekit_px.inspection.values import Values
from mergekit_px.methods.matrices import is_table
from mergekit_px.plan.bases import DECLARED_BASE
from mergekit_px.plan.nodes import Adapted, Apply, Node, Read, walk

if TYPE_CHECKING:
    import torch

    from mergekit_px.checkpoint.reader import TensorReader
    from mergekit_px.plan.model import Plan, WorkItem

_DECOMPOSITION = 4e11
"""What all decompositions together may cost, counted as rows x columns x the shorter of both: a minute or so."""
_MOST_MATRICES = 48


class SourceRelation(BaseModel):
    """One source against the base, or without one against the first source, whose own numbers are then None."""

    name: str
    reference: str
    norm: float | None = Field(description="Norm of the change.")
    relative: float | None = Field(description="Norm of the change, as a share of the norm of the reference.")
    cosine: float | None = Field(description="Cosine of the weights of both.")
    matrix_cosine: float | None = Field(
        description="The same over tensors of two axes or more, as norms are all alike."
    )
    rank_share: float | None = Field(description="Effective rank of the change, as a share of the largest possible.")


class Relations(BaseModel):
    """What models are to one another: numbers over all tensors that a merge would combine.

    Changes are those from the base, or where there is none from the first source, which then has no row of its own in
    ``cosines`` and ``alignments``.
    """

    base: str | None
    sources: list[SourceRelation]
    tensors: int = Field(description="Tensors that were compared.")
    matrices: int = Field(description="Matrices that were decomposed, of those that are no embeddings or heads.")
    cosines: list[list[float | None]] = Field(description="Cosines of the changes of each pair of sources.")
    alignments: list[list[float | None]] | None = Field(
        description="How far the change of one source lies within the leading left subspace of another's."
    )
    sign_conflicts: float | None = Field(description="Share of the changed elements in which changes differ in sign.")

    @property
    def of_changes(self) -> bool:
        """Whether each source has a change: there is a base, or all are task vectors."""
        return len(self.cosines) == len(self.sources)

    def same(self, one: int, other: int) -> bool:
        """Whether two sources are the same up to rounding of the sums."""
        skipped = len(self.sources) - len(self.cosines)
        norms = [self.sources[place].norm or 0.0 for place in (one, other)]
        if min(norms) == 0:
            return norms[0] == norms[1]
        return math.isclose(*norms) and (self.cosines[one - skipped][other - skipped] or 0.0) > 1 - 1e-9

    @property
    def relative(self) -> float | None:
        """Mean over the sources."""
        return _mean([source.relative for source in self.sources])

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the changes of different sources."""
        count = len(self.cosines)
        return _mean([self.cosines[i][j] for i in range(count) for j in range(i)])

    @property
    def rank_share(self) -> float | None:
        return _mean([source.rank_share for source in self.sources])

    @property
    def alignment(self) -> float | None:
        return mean_alignment(self.alignments)


def relations(plan: Plan, *, progress: Callable[[int, int], None] | None = None) -> Relations:
    """Measure the sources of a plan of one step, whose inputs are on this machine.

    Args:
        progress: called with bytes read and bytes in all.

    Raises:
        InputError: a tensor that cannot be read.
        NonFiniteError: a NaN or an infinity in one.
    """
    from mergekit_px.kernels.workers import workers

    (step,) = plan.loaded.recipe.steps.values()
    names = step.source_names()
    items = [item for item in plan.items if isinstance(item.node, Apply) and len(item.node.sources) == len(names)]
    chosen = _sample(items, len(names))
    base = step.base or (DECLARED_BASE if DECLARED_BASE in plan.inputs else None)
    others = names if base is not None or _all_changes(items) else names[1:]
    total, large = Difference.zero(len(others)), Difference.zero(len(others))
    rows, tensors = [], 0
    bytes_done, bytes_total = 0, sum(map(_bytes, items))
    with ExitStack() as stack:
        operands = _operands(plan, stack)
        pool = stack.enter_context(workers())
        for item in items:
            values = operands(item)
            sums = compare_tensor(values, pool)
            if sums is not None:
                _require_finite(sums, item, names)
                total.add(sums)
                if len(item.shape) > 1:
                    large.add(sums)
                tensors += 1
                if item.name in chosen:
                    rows.append(_shares(spectra(values), item.shape))
            bytes_done += _bytes(item)
            if progress is not None:
                progress(bytes_done, bytes_total)
    means = mean_spectra(rows, len(others))
    measured = {name: total.of(place) for place, name in enumerate(others)}
    shares = dict(zip(others, means["effective_ranks"], strict=True))
    return Relations(
        base=None if base is None else plan.inputs[base].reference,
        sources=[
            SourceRelation(
                name=name,
                reference=plan.inputs[name].reference,
                norm=measured[name]["difference"] if name in measured else None,
                relative=measured[name]["relative"] if name in measured else None,
                cosine=measured[name]["cosine"] if name in measured else None,
                matrix_cosine=large.of(others.index(name))["cosine"] if name in measured else None,
                rank_share=shares.get(name),
            )
            for name in names
        ],
        tensors=tensors,
        matrices=len(rows),
        cosines=total.delta_cosines(),
        alignments=means["alignments"] if rows and len(others) > 1 else None,
        sign_conflicts=total.sign_conflicts(),
    )


def _all_changes(items: Sequence[WorkItem]) -> bool:
    """Whether the sources are task vectors, and there is no base."""
    return all(isinstance(item.node, Apply) and item.node.kind == "delta" for item in items)


def _require_finite(sums: Difference, item: WorkItem, names: Sequence[str]) -> None:
    """Raises NonFiniteError for a NaN or an infinity, which no merge takes."""
    squares = [sums.gram[place][place] for place in range(len(sums.gram))]
    if not math.isfinite(sums.reference_square):
        raise NonFiniteError("the reference holds a NaN or an infinity", where=item.name)
    for name, square in zip(names[-len(squares) :], squares, strict=True):
        if not math.isfinite(square):
            raise NonFiniteError(f"'{name}' holds a NaN or an infinity", where=item.name)


def _bytes(item: WorkItem) -> int:
    return sum(read.tensor.nbytes for read in item.reads) + item.factor_bytes


def _sample(items: Sequence[WorkItem], sources: int) -> set[str]:
    """The matrices that are decomposed: evenly spread over the model, and as many as the cost allows."""
    costs = {
        item.name: sources * math.prod(item.shape) * min(item.shape)
        for item in items
        if len(item.shape) == 2 and min(item.shape) > 1 and not is_table(item.name)
    }
    small = [name for name, cost in costs.items() if cost <= _DECOMPOSITION / 4]
    for count in range(min(len(small), _MOST_MATRICES), 0, -1):
        chosen = {small[place * len(small) // count] for place in range(count)}
        if sum(costs[name] for name in chosen) <= _DECOMPOSITION:
            return chosen
    return set()


def _operands(plan: Plan, stack: ExitStack) -> Callable[[WorkItem], list[Values]]:
    """What an item is made of: the reference, then the others, as weights; zeros where there is no reference."""
    import torch

    from mergekit_px.execute.run import plan_checkpoints
    from mergekit_px.execute.views import ViewValues, stored_factors

    readers: dict[str, TensorReader] = {
        label: stack.enter_context(closing(open_reader(checkpoint)))
        for label, checkpoint in plan_checkpoints(plan).items()
    }

    views = ViewValues(readers, stored_factors(readers), 0, torch.float64)

    def values(item: WorkItem, node: Node | None, base: Node | None = None) -> Values:
        if node is None:
            return _values(item, lambda start, stop: torch.zeros(stop - start, dtype=torch.float64))
        if isinstance(node, Read) and base is None:
            reader, tensor = readers[node.input], node.tensor
            return _values(item, lambda start, stop: read_elements(reader, tensor, slice(start, stop)))
        read = views.values(node)
        if any(isinstance(inner, Adapted) for inner in walk(node)):  # factors are read, and rows made, all at once
            kept = read(0, item.elements)
            read = lambda start, stop: kept[start:stop]  # noqa: E731
        if base is None:
            return _values(item, read)
        onto = views.values(base)
        return _values(item, lambda start, stop: onto(start, stop) + read(start, stop))

    def operands(item: WorkItem) -> list[Values]:
        node = item.node
        assert isinstance(node, Apply)
        if node.base is None and node.kind == "weights":
            return [values(item, source) for source in node.sources]
        changes = [node.base if source.kind == "delta" else None for source in node.sources]
        return [
            values(item, node.base),
            *(values(item, source, base) for source, base in zip(node.sources, changes, strict=True)),
        ]

    return operands


def _values(item: WorkItem, read: Callable[[int, int], torch.Tensor]) -> Values:
    return Values(item.name, item.node.dtype, item.shape, item.elements * item.node.dtype.bits // 8, read, None)


def _shares(found: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """Effective ranks as shares of the largest possible."""
    ranks = found["effective_ranks"]
    shares = None if ranks is None else [None if rank is None else rank / min(shape) for rank in ranks]
    return {**found, "effective_ranks": shares}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
