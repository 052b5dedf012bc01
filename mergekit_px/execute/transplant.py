"""Rows of tokens that a model lacks, as mixtures of its own: fitted in the donor of the tokenizer, where they exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mergekit_px.artefacts.row_mixtures import write_row_mixtures
from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.errors import PlanError
from mergekit_px.execute.views import ViewValues
from mergekit_px.kernels.pursuit import matching_pursuit, nearest_neighbours
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.nodes import Read, RowMean, RowMixture, Rows
from mergekit_px.plan.rows import Indices
from mergekit_px.plan.tied import is_head, is_vocabulary

Fit = Literal["omp", "nearest"]

_ATOMS_AT_ONCE = 1 << 22
"""Elements of atoms that are read at a time."""
_PICKED_AT_ONCE = 1 << 23
"""Elements of the atoms that a block of vectors has picked."""


def fit_absent_rows(
    plan: Plan, donor: str, fit: Fit, count: int, path: Path, advance: Callable[[int, int], None]
) -> int:
    """Write what makes up the rows that a plan fills with means.

    A row is fitted by rows of tokens that both models have, in the donor's own tensor; the same mixture of the
    target's rows then stands for it.

    Args:
        plan: of the transplant with `absent: mean`.
        donor: the input whose tokenizer it is.
        count: rows that one is made of.
        advance: told of (rows done, rows in all).

    Returns:
        how many rows were fitted.

    Raises:
        PlanError: no tokens in common, or a donor whose rows are stored in another form than as numbers.
    """
    items = [(item, table) for item in plan.items if (table := _means(item)) is not None]
    whole = sum(len(_absent(table)) for _, table in items)
    done = 0
    written: dict[str, dict[str, torch.Tensor]] = {}
    for item, table in items:
        stored = _donor_tensor(item.name, plan.inputs[donor])
        places, own = _shared(table)
        absent = _absent(table)
        places, own = places[places < stored.shape[0]], own[places < stored.shape[0]]
        absent = absent[absent < stored.shape[0]]
        if not len(places):
            raise PlanError(f"no token of '{item.name}' is in both models, so none can be made of others")
        with closing(open_reader(plan.inputs[donor].checkpoint)) as reader:
            rows = _Rows(reader, donor, stored)
            few = min(count, len(places))
            numbers, factors = [], []
            step = max(1, _PICKED_AT_ONCE // (few * rows.width))
            for begin in range(0, len(absent), step):
                vectors = rows.gathered(absent[begin : begin + step])
                blocks = rows.blocks(places)
                if fit == "omp":
                    found = matching_pursuit(vectors, blocks, partial(rows.chosen, places), few)
                else:
                    found = nearest_neighbours(vectors, blocks, few)
                numbers.append(found[0])
                factors.append(found[1])
                done += len(vectors)
                advance(done, whole)
        if numbers:
            written[item.name] = {
                "places": torch.from_numpy(absent),
                "rows": torch.from_numpy(own)[torch.cat(numbers)],
                "weights": torch.cat(factors),
            }
    write_row_mixtures(path, written)
    return done


class _Rows:
    """Rows of a stored tensor, in float32."""

    def __init__(self, reader: TensorReader, name: str, stored: StoredTensor) -> None:
        self.width = math.prod(stored.shape[1:])
        self._read = Read(name, stored, stored.shape, "weights")
        self._views = ViewValues({name: reader}, lambda _: {}, 0, torch.float32)

    def gathered(self, places: Indices) -> torch.Tensor:
        return self._views.values(Rows(self._read, places))(0, len(places) * self.width).view(-1, self.width)

    def chosen(self, places: Indices, numbers: torch.Tensor) -> torch.Tensor:
        return self.gathered(places[numbers.numpy()])

    def blocks(self, places: Indices) -> Callable[[], Iterator[tuple[int, torch.Tensor]]]:
        step = max(1, _ATOMS_AT_ONCE // self.width)
        return lambda: ((start, self.gathered(places[start : start + step])) for start in range(0, len(places), step))


def _means(item: WorkItem) -> RowMixture | None:
    """The mixture of a vocabulary's rows in which means stand for tokens that the model lacks."""
    if not is_vocabulary(item.name) or len(item.shape) != 2:
        return None
    mixtures = (node for node in item.nodes if isinstance(node, RowMixture) and isinstance(node.sources[0], Read))
    return next((node for node in mixtures if isinstance(node.sources[-1], RowMean)), None)


def _absent(mixture: RowMixture) -> Indices:
    """The rows that are means."""
    table = mixture.table
    rows = np.repeat(np.arange(mixture.rows), np.diff(table.starts))
    return rows[table.operand > 0]


def _shared(
    mixture: RowMixture,
) -> tuple[Indices, Indices]:
    """The rows that are the model's own, and which of its rows they are."""
    table = mixture.table
    rows = np.repeat(np.arange(mixture.rows), np.diff(table.starts))
    return rows[table.operand == 0], table.row[table.operand == 0]


def _donor_tensor(name: str, donor: ResolvedInput) -> StoredTensor:
    """The donor's embedding, or its head for a head where it has one of its own."""
    tensors = donor.checkpoint.tensors
    own = [tensor for key, tensor in tensors.items() if is_vocabulary(key) and len(tensor.shape) == 2]
    fitting = [tensor for tensor in own if is_head(tensor.name) == is_head(name)] or own
    if not fitting or not fitting[0].dtype.arithmetic:
        what = f"the rows of '{name}' are to be fitted to those of the donor, which stores none as plain numbers"
        raise PlanError(what, where=donor.reference, hint="give its dequantised checkpoint, or --method subword")
    return fitting[0]
