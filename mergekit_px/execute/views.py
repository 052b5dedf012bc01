"""The elements of views: gathered rows and decoded values, made from no more of their operands than they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.execute.values import Block, LoadFactors
from mergekit_px.plan.model import Decoded, Leaf, Node, Read, Rows

Values = Callable[[int, int], torch.Tensor]
"""Gives the elements [start, stop) of a node, flat."""

_LONGEST_GAP = 4096
"""Bytes that are read and thrown away rather than reading twice."""


@dataclass(frozen=True)
class ViewValues:
    """Evaluates what inputs offer, on the CPU and in one dtype."""

    readers: Mapping[str, TensorReader]
    factors: LoadFactors
    seed: int
    dtype: torch.dtype

    def values(self, node: Node) -> Values:
        """The elements of a node."""
        if isinstance(node, Read):
            return lambda start, stop: stored_values(self.readers[node.input], node.tensor, start, stop).to(self.dtype)
        if isinstance(node, Decoded):
            return self._decoded(node)
        return self._gathered(node) if isinstance(node, Rows) else self._computed(node)

    def _decoded(self, node: Decoded) -> Values:
        reader = self.readers[node.parts[0].input]

        def read(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
            return stored_values(reader, tensor, start, stop)

        def values(start: int, stop: int) -> torch.Tensor:
            row = math.prod(node.shape[1:])
            begin, end = start // row, -(-stop // row)
            rows = node.encoding.rows(read, begin, end).reshape(-1)
            return rows[start - begin * row : stop - begin * row].to(self.dtype)

        return values

    def _gathered(self, node: Rows) -> Values:
        row = math.prod(node.shape[1:])
        operand = self.values(node.operand)
        gap = max(1, 8 * _LONGEST_GAP // max(1, row * node.dtype.bits))

        def values(start: int, stop: int) -> torch.Tensor:
            begin, end = start // row, -(-stop // row)
            wanted = node.index[begin:end]
            out = torch.zeros((end - begin, row), dtype=self.dtype)
            order = np.argsort(wanted, kind="stable")
            order = order[np.searchsorted(wanted[order], 0) :]  # rows that are absent stay zero
            ends = np.flatnonzero(np.diff(wanted[order]) > gap) + 1
            for run in np.split(order, ends) if order.size else []:
                first, last = int(wanted[run[0]]), int(wanted[run[-1]]) + 1
                found = operand(first * row, last * row).view(-1, row)
                out[torch.from_numpy(run)] = found[torch.from_numpy(wanted[run] - first)]
            return out.view(-1)[start - begin * row : stop - begin * row]

        return values

    def _computed(self, node: Node) -> Values:
        """An adapted operand: its rows by the same evaluation as everywhere."""

        def values(start: int, stop: int) -> torch.Tensor:
            def load(leaf: Leaf) -> torch.Tensor:
                return self.values(leaf)(start, stop)

            block = Block("", start, load, self.factors, {}, self.seed, node.shape, stop)
            return block.value(node).reshape(-1).cpu()

        return values


def stored_values(reader: TensorReader, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """The elements [start, stop) of a stored tensor, as stored."""
    width = tensor.dtype.bits // 8
    buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
    reader.read_into(tensor, start * width, buffer.numpy().data)
    return buffer.view(tensor.dtype.torch)
