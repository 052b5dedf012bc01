"""Sums of features by class, in float64 and in the order of the examples."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_px.errors import InputError


class ClassMeans:
    """Means over the examples of each class.

    Args:
        labels: of all examples, (n,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.classes, self._places, self.counts = labels.unique(return_inverse=True, return_counts=True)
        self._sums: Tensor | None = None
        self._done = 0

    def add(self, features: Tensor, where: str) -> None:
        """Take in the features (b, d) of the next examples.

        Raises:
            InputError: features of another width than those before.
        """
        wide = features.double().cpu()
        if self._sums is None:
            self._sums = torch.zeros(len(self.classes), wide.shape[1], dtype=torch.float64)
        if wide.shape[1] != self._sums.shape[1]:
            raise InputError(f"features of {wide.shape[1]} numbers after some of {self._sums.shape[1]}", where=where)
        self._sums.index_add_(0, self._places[self._done : self._done + len(wide)], wide)
        self._done += len(wide)

    def means(self) -> Tensor:
        """(classes, d) float64, in ascending order of the classes, once all examples are in."""
        assert self._sums is not None and self._done == len(self._places)
        means: Tensor = self._sums / self.counts.unsqueeze(1)
        return means
