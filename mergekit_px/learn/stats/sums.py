"""Sums over a data set that can be put down and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import NonFiniteError
from mergekit_px.learn.data import Examples

Tell = Callable[[int, int], None]
Tensors = dict[str, Tensor]

STATISTICS_KIND = "statistics"
FINGERPRINT_KEY = "pxmerge.model_fingerprint"
"""What a file of statistics says in its header: that it is one, and of which model."""


class Sums(Protocol):
    """What grows batch by batch.

    Attributes:
        batch: examples in one batch.
    """

    batch: int

    def add(self, number: int, examples: Examples) -> None:
        """Add the batch with that number. Raises what a forward pass can."""

    def state(self) -> Tensors:
        """The sums so far, themselves."""

    def restore(self, state: Tensors) -> None:
        """Go on from sums that `state` gave."""


def add_up(
    sums: Sums,
    data: Examples,
    tell: Tell = lambda done, total: None,
    *,
    first: int = 0,
    after: Callable[[int], None] = lambda batches: None,
) -> None:
    """Add all batches of the data from batch ``first`` on.

    Args:
        tell: gets the examples that are done, and all.
        after: gets the number of batches that are done, after each.
    """
    for number in range(first, -(-len(data) // sums.batch)):
        rows = torch.arange(number * sums.batch, min((number + 1) * sums.batch, len(data)))
        part = data.take(rows)
        sums.add(number, part)
        after(number + 1)
        tell(int(rows[-1]) + 1, len(data))


def require_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor. Raises ``NonFiniteError`` for a NaN or an infinity in it."""
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError("a statistic is NaN or infinite", where=shown(name))
    return tensor
