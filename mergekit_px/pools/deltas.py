"""The task vectors that a plan's spectral merge works on, one tensor of one source at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.whole import read_elements, read_tensor
from mergekit_px.errors import PlanError
from mergekit_px.execute.items import accumulation_dtype
from mergekit_px.execute.lane import pick_device
from mergekit_px.execute.run import plan_checkpoints
from mergekit_px.execute.values import WholeTensor, check_finite
from mergekit_px.execute.views import ViewValues
from mergekit_px.kernels.low_rank import LowRank
from mergekit_px.methods.declare import Operands
from mergekit_px.methods.svd import SvdParams
from mergekit_px.plan.fingerprints import local_fingerprint
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.nodes import Adapted, Apply, Leaf, Read


@dataclass(frozen=True)
class Merge:
    """One tensor that the method ``svd`` merges."""

    item: WorkItem
    node: Apply | None
    """None where the sources leave the tensor as the base has it."""
    params: SvdParams

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in one source."""
        return self.item.elements * self.item.dtype.bits // 8


def merges_of(plan: Plan) -> list[Merge]:
    """The tensors that are merged, in the plan's order; those that stay as the base has them are left out.

    Raises:
        PlanError: a tensor is made in another way, or some source lacks it.
    """
    applied = [item.node for item in plan.items if isinstance(item.node, Apply)]
    bases = {node.base.input for node in applied if isinstance(node.base, Read)}
    count = max((len(node.sources) for node in applied), default=0)
    found: list[Merge] = []
    for item in plan.items:
        node = item.node
        if isinstance(node, Read) and (node.input in bases or not node.dtype.arithmetic):
            continue
        if not isinstance(node, Apply) or not isinstance(node.params, SvdParams):
            raise PlanError(
                "the tensor is not merged by svd, so it has no components",
                where=shown(item.name),
                hint="write a checkpoint instead",
            )
        if len(node.sources) != count:
            raise PlanError("some sources do not have the tensor", where=shown(item.name), hint="write a checkpoint")
        found.append(Merge(item, node, node.params))
    if not found:
        raise PlanError("no tensor is merged")
    return found


def single_base(plan: Plan) -> str | None:
    """The input that the task vectors are differences to; None where there is none, or it is a mean of models."""
    nodes = [item.node.base for item in plan.items if isinstance(item.node, Apply)]
    names = {node.input if isinstance(node, Read) else None for node in nodes}
    return names.pop() if len(names) == 1 else None


def base_print(plan: Plan) -> str | None:
    """The fingerprint of the base, or the one that the sources, all task vectors, recorded; None if not known."""
    base = single_base(plan)
    if base is not None:
        return local_fingerprint(plan.inputs[base])
    if any(isinstance(item.node, Apply) and item.node.base is not None for item in plan.items):
        return None
    recorded = {plan.inputs[read.model].base_fingerprint for item in plan.items for read in item.reads}
    return recorded.pop() if len(recorded) == 1 else None


class DeltaReader:
    """Reads sources; see :func:`open_deltas`."""

    def __init__(self, readers: Mapping[str, TensorReader], labels: Mapping[str, str], device: torch.device) -> None:
        self._readers = readers
        self._labels = labels
        self.device = device

    def operands(self, node: Apply, item: WorkItem) -> Operands:
        """What the method is given. ``tensors`` are read and made anew each time one is asked for."""
        dtype = accumulation_dtype(item)

        def load(read: Leaf) -> Tensor:
            if not isinstance(read, Read):
                values = ViewValues(self._readers, self._factors, 0, dtype).values(read)
                return values(0, math.prod(read.shape)).view(read.shape).to(self.device)
            value = read_elements(self._readers[read.input], read.tensor, slice(0, math.prod(read.shape)))
            value = value.to(self.device).to(dtype)
            check_finite(value, f"{self._labels[read.input]}: {read.tensor.name}", "the source")
            return value.view(read.shape)

        block = WholeTensor(item.name, 0, load, self._factors, {}, 0, item.shape, item.elements)
        return block.operands(node)

    def factored(self, merge: Apply, source: int) -> LowRank | None:
        """A source's delta as factors where an adapter gives it so: (m, n), further axes flattened."""
        node = merge.sources[source]
        if not isinstance(node, Adapted) or node.kind != "delta":
            return None
        if node.patch is None:
            rows, columns = node.shape[0], math.prod(node.shape[1:])
            none = torch.zeros(rows + columns, 0, device=self.device)
            return LowRank(none[:rows], none[rows:])
        pair = node.patch.low_rank(self._factors(node))
        return None if pair is None else LowRank(pair[0], pair[1].T)

    def _factors(self, node: Adapted) -> dict[str, Tensor]:
        label = f"{node.input}#{node.number}"
        found: dict[str, Tensor] = {}
        for role, stored in (node.patch.factors if node.patch is not None else {}).items():
            found[role] = read_tensor(self._readers[label], stored).to(self.device)
            if found[role].is_floating_point():
                check_finite(found[role].float(), f"{self._labels[label]}: {stored.name}", "the adapter")
        return found


@contextmanager
def open_deltas(plan: Plan) -> Iterator[DeltaReader]:
    """A reader of the sources of a plan whose inputs are all on this machine.

    Raises:
        InputError: a file that cannot be read.
        PlanError: a step before the merge that needs a pass over the model of its own.
    """
    for item in plan.items:
        if any(node.method.statistics is not None for node in item.applied):
            raise PlanError("the step before the merge cannot be repeated tensor by tensor", where=shown(item.name))
    with ExitStack() as stack:
        checkpoints = plan_checkpoints(plan)
        readers = {name: stack.enter_context(closing(open_reader(one))) for name, one in checkpoints.items()}
        labels = {name: one.label for name, one in checkpoints.items()}
        yield DeltaReader(readers, labels, pick_device(plan.device))
