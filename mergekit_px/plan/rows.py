"""Which rows of which tensors make up the rows of a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class RowTable:
    """Which rows make up each row of a mixture: entries ``starts[i]`` to ``starts[i + 1]`` are those of row ``i``.

    Attributes:
        starts: one more than there are rows.
        operand: for each entry, the number of an operand.
        row: for each entry, a row of that operand.
        weight: for each entry, its factor.
    """

    starts: Indices
    operand: np.ndarray[Any, np.dtype[np.int16]]
    row: Indices
    weight: np.ndarray[Any, np.dtype[np.float32]]

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for part, code in ((self.starts, "<i8"), (self.operand, "<i2"), (self.row, "<i8"), (self.weight, "<f4")):
            digest.update(part.astype(code).tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, index: Indices, mixed: Mapping[int, Sequence[tuple[int, int, float]]]) -> RowTable:
        """Rows of the first operand by an index, nothing where that is -1, and mixtures in the places that have them.

        Args:
            mixed: place -> (operand, row, weight) of each entry.
        """
        counts = (index >= 0).astype(np.int64)
        for place, entries in mixed.items():
            counts[place] = len(entries)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        operand = np.zeros(starts[-1], dtype=np.int16)
        row = np.zeros(starts[-1], dtype=np.int64)
        weight = np.ones(starts[-1], dtype=np.float32)
        plain = np.flatnonzero(index >= 0)
        row[starts[plain]] = index[plain]
        for place, entries in mixed.items():
            for number, entry in enumerate(entries, int(starts[place])):
                operand[number], row[number], weight[number] = entry
        return cls(starts, operand, row, weight)
