"""The tensors of models as they mean them: encoded ones decoded, names as those of the first model, read in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.whole import read_elements
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.names import bridge
from mergekit_px.plan.nodes import Node, Read
from mergekit_px.plan.views import stored_view

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 18


@dataclass(frozen=True)
class Values:
    """One tensor of one model; ``read`` gives the elements [start, stop), flat, in some dtype that holds them."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], torch.Tensor]
    stored: tuple[TensorReader, StoredTensor] | None

    def same_bytes(self, other: Values) -> bool:
        """Whether both are stored, and alike."""
        if self.stored is None or other.stored is None or self.dtype != other.dtype or self.nbytes != other.nbytes:
            return False
        for start in range(0, self.nbytes, _PIECE):
            pieces = [bytearray(min(_PIECE, self.nbytes - start)) for _ in range(2)]
            for (reader, tensor), piece in zip((self.stored, other.stored), pieces, strict=True):
                reader.read_into(tensor, start, memoryview(piece))
            if pieces[0] != pieces[1]:
                return False
        return True


def offered_values(models: Sequence[Checkpoint], stack: ExitStack) -> tuple[list[dict[str, Values]], list[str]]:
    """What each model offers, by the names of the first, and what was decoded and read under other names.

    Args:
        stack: closes the readers.

    Raises:
        InputError: a model that is not on this machine; scales that do not fit their codes.
        PlanError: tensors that are known to be encoded and cannot be decoded.
    """
    import torch

    from mergekit_px.execute.views import ViewValues

    readers = {str(place): stack.enter_context(closing(open_reader(model))) for place, model in enumerate(models)}
    decoded = ViewValues(readers, lambda patch: {}, 0, torch.float64)
    notes: list[str] = []

    def values(name: str, node: Node) -> Values:
        if not isinstance(node, Read):
            return Values(name, node.dtype, node.shape, _nbytes(node), decoded.values(node), None)
        reader, tensor = readers[node.input], node.tensor
        return Values(
            name,
            node.dtype,
            node.shape,
            tensor.nbytes,
            lambda start, stop: read_elements(reader, tensor, slice(start, stop)),
            (reader, tensor),
        )

    nodes: list[Mapping[str, Node]] = []
    for place, model in enumerate(models):
        view = stored_view(ResolvedInput(str(place), model.label, model))
        notes += [note.replace(f"'{place}'", f"'{model.label}'") for note in view.notes]
        own: Mapping[str, Node] = view.nodes
        if nodes and (found := bridge(nodes[0], own)).names:
            new = {old: name for name, old in found.names.items()}
            own = {new.get(name, name): node for name, node in own.items()}
            notes.append(f"names of '{model.label}' are read as those of '{models[0].label}': {found.describe()}")
        nodes.append(own)
    return [{name: values(name, node) for name, node in own.items()} for own in nodes], notes


def _nbytes(node: Node) -> int:
    return math.prod(node.shape) * node.dtype.bits // 8
