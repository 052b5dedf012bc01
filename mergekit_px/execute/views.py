"""The elements of views: rows gathered and mixed, decoded values, from no more of their operands than they need."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.checkpoint.reader import TensorReader
from mergekit_px.checkpoint.whole import read_elements, read_tensor
from mergekit_px.execute.values import Block, LoadFactors
from mergekit_px.kernels.random import drawn
from mergekit_px.plan.budget import BLOCK
from mergekit_px.plan.nodes import Adapted, Decoded, Drawn, Joined, Leaf, Node, Read, RowMean, RowMixture, Rows, Section
from mergekit_px.plan.rows import Indices

Values = Callable[[int, int], torch.Tensor]
"""Gives the elements [start, stop) of a node, flat."""

_LONGEST_GAP = 4096
"""Bytes that are read and thrown away rather than reading twice."""


class RowMeans:
    """The means of rows that a run needs, each summed once, by whichever worker comes first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._known: dict[int, torch.Tensor] = {}

    def row(self, node: RowMean, summed: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The mean of a node."""
        with self._lock:
            if id(node) not in self._known:
                self._known[id(node)] = summed()
            return self._known[id(node)]


@dataclass(frozen=True)
class ViewValues:
    """Evaluates what inputs offer, on the CPU and in one dtype."""

    readers: Mapping[str, TensorReader]
    factors: LoadFactors
    seed: int
    dtype: torch.dtype
    means: RowMeans = field(default_factory=RowMeans)

    def values(self, node: Node) -> Values:
        """The elements of a node."""
        if isinstance(node, Read):
            reader = self.readers[node.input]
            return lambda start, stop: read_elements(reader, node.tensor, slice(start, stop)).to(self.dtype)
        if isinstance(node, Decoded):
            return self._decoded(node)
        if isinstance(node, Rows):
            return self._gathered(node)
        if isinstance(node, RowMixture):
            return self._mixed(node)
        if isinstance(node, Section):
            operand = self.values(node.operand)
            return lambda start, stop: operand(node.start + start, node.start + stop)
        if isinstance(node, Joined):
            return self._joined(node)
        if isinstance(node, Drawn):
            return partial(self._drawn, node)
        return self._mean(node) if isinstance(node, RowMean) else self._computed(node)

    def _decoded(self, node: Decoded) -> Values:
        reader = self.readers[node.parts[0].input]

        def read(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
            return read_elements(reader, tensor, slice(start, stop))

        def values(start: int, stop: int) -> torch.Tensor:
            row = math.prod(node.shape[1:])
            begin, end = start // row, -(-stop // row)
            rows = node.encoding.rows(read, begin, end).reshape(-1)
            return rows[start - begin * row : stop - begin * row].to(self.dtype)

        return values

    def _gathered(self, node: Rows) -> Values:
        row = math.prod(node.shape[1:])
        operand = self.values(node.operand)

        def values(start: int, stop: int) -> torch.Tensor:
            begin, end = start // row, -(-stop // row)
            out = torch.zeros((end - begin, row), dtype=self.dtype)
            self._gather(operand, node.index[begin:end], np.arange(end - begin), out, node.dtype.bits)
            return out.view(-1)[start - begin * row : stop - begin * row]

        return values

    def _gather(self, operand: Values, wanted: Indices, places: Indices, out: torch.Tensor, bits: int) -> None:
        """Put some rows in some places, read by runs of neighbours; nothing is put where the number is -1."""
        row = out.shape[1]
        gap = max(1, 8 * _LONGEST_GAP // max(1, row * bits))
        order = np.argsort(wanted, kind="stable")
        order = order[np.searchsorted(wanted[order], 0) :]
        ends = np.flatnonzero(np.diff(wanted[order]) > gap) + 1
        for run in np.split(order, ends) if order.size else []:
            first, last = int(wanted[run[0]]), int(wanted[run[-1]]) + 1
            found = operand(first * row, last * row).view(-1, row)
            target, count = int(places[run[0]]), len(run)
            if last - first == count and (np.diff(wanted[run]) == 1).all() and (np.diff(places[run]) == 1).all():
                out[target : target + count] = found
            else:
                out[torch.from_numpy(places[run])] = found[torch.from_numpy(wanted[run] - first)]

    def _mixed(self, node: RowMixture) -> Values:
        row = math.prod(node.shape[1:])
        operands = [self.values(source) for source in node.sources]
        table = node.table

        def values(start: int, stop: int) -> torch.Tensor:
            begin, end = start // row, -(-stop // row)
            out = torch.zeros((end - begin, row), dtype=self.dtype)
            first, last = int(table.starts[begin]), int(table.starts[end])
            counts = np.diff(table.starts[begin : end + 1])
            target = np.repeat(np.arange(end - begin), counts)
            plain = (np.repeat(counts, counts) == 1) & (table.weight[first:last] == 1)
            for number, operand in enumerate(operands):
                bits = node.sources[number].dtype.bits
                mine = table.operand[first:last] == number
                alone = np.flatnonzero(mine & plain)
                self._gather(operand, table.row[first + alone], target[alone], out, bits)
                entries = np.flatnonzero(mine & ~plain)
                # No more rows at a time than the block has, however many make up one of them.
                for piece in range(0, len(entries), end - begin):
                    some = entries[piece : piece + end - begin]
                    found = torch.zeros((len(some), row), dtype=self.dtype)
                    self._gather(operand, table.row[first + some], np.arange(len(some)), found, bits)
                    found *= torch.from_numpy(table.weight[first + some]).to(self.dtype)[:, None]
                    out.index_add_(0, torch.from_numpy(target[some]), found)
            return out.view(-1)[start - begin * row : stop - begin * row]

        return values

    def _joined(self, node: Joined) -> Values:
        operands = [self.values(part) for part in node.parts]
        ends = np.cumsum([math.prod(part.shape) for part in node.parts])

        def values(start: int, stop: int) -> torch.Tensor:
            found = []
            for number in range(int(np.searchsorted(ends, start, side="right")), len(operands)):
                begin = int(ends[number - 1]) if number else 0
                if begin >= stop:
                    break
                found.append(operands[number](max(start - begin, 0), min(stop, int(ends[number])) - begin))
            return torch.cat(found) if len(found) != 1 else found[0]

        return values

    def _drawn(self, node: Drawn, start: int, stop: int) -> torch.Tensor:
        numbers = drawn(self.seed, node.stream, start, stop - start, node.distribution)
        return torch.from_numpy(numbers).mul_(node.scale).to(self.dtype)

    def _mean(self, node: RowMean) -> Values:
        def values(start: int, stop: int) -> torch.Tensor:
            return self.means.row(node, lambda: self._summed(node.operand))[start:stop].to(self.dtype)

        return values

    def _summed(self, operand: Node) -> torch.Tensor:
        rows, row = operand.shape[0], math.prod(operand.shape[1:])
        elements = self.values(operand)
        total = torch.zeros(row, dtype=torch.float64)
        step = max(1, BLOCK // row)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            total += elements(begin * row, end * row).view(-1, row).sum(0, dtype=torch.float64)
        return total / max(1, rows)

    def _computed(self, node: Node) -> Values:
        """An adapted operand: its rows by the same evaluation as everywhere."""

        def values(start: int, stop: int) -> torch.Tensor:
            def load(leaf: Leaf) -> torch.Tensor:
                return self.values(leaf)(start, stop)

            block = Block("", start, load, self.factors, {}, self.seed, node.shape, stop)
            return block.value(node).reshape(-1).cpu()

        return values


def stored_factors(readers: Mapping[str, TensorReader]) -> LoadFactors:
    """What reads an adapter's tensors for one target, as stored, from the readers of a plan."""

    def load(node: Adapted) -> dict[str, torch.Tensor]:
        reader = readers[f"{node.input}#{node.number}"]
        stored = node.patch.factors if node.patch is not None else {}
        return {role: read_tensor(reader, one) for role, one in stored.items()}

    return load
