"""Least squares on the inputs, or outputs, that task vectors themselves stand for.

A task vector D of a linear layer maps the inputs of its task; where the data is not there, ``D'D`` stands for their
Gram matrix and ``DD'`` for that of the outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergekit_px.errors import NonFiniteError

Sides = Literal["inputs", "outputs", "both"]


class SelfRegression:
    """The X that minimises ``sum_t w_t ||(X - D_t) D_t'||^2`` (inputs) or ``sum_t w_t ||D_t' (X - D_t)||^2`` (outputs).

    Both have the target ``sum_t w_t D_t D_t' D_t``. Sums are float64; one (m, n), and an (n, n) or (m, m) matrix or
    both, are held.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, sides: Sides, label: str) -> None:
        rows, columns = shape
        self._target = like.new_zeros(shape, dtype=torch.float64)
        self._inputs = like.new_zeros((columns, columns), dtype=torch.float64) if sides != "outputs" else None
        self._outputs = like.new_zeros((rows, rows), dtype=torch.float64) if sides != "inputs" else None
        self._label = label

    def add(self, delta: Tensor, weight: float) -> None:
        """Take in a task vector; the weight is not negative."""
        delta = delta.double()
        if self._inputs is not None:
            gram = delta.T @ delta
            self._inputs.add_(gram, alpha=weight)
            self._target.addmm_(delta, gram, alpha=weight)
        if self._outputs is not None:
            gram = delta @ delta.T
            self._outputs.add_(gram, alpha=weight)
            if self._inputs is None:
                self._target.addmm_(gram, delta, alpha=weight)

    def solved(self, ridge: float) -> Tensor:
        """The minimiser; of both sides the mean. ``ridge`` is added to the diagonals in shares of their mean.

        Raises:
            NonFiniteError: a task vector held a NaN or an infinity.
        """
        found = [_solved(gram, self._target.T, ridge, self._label).T for gram in [self._inputs] if gram is not None]
        found += [_solved(gram, self._target, ridge, self._label) for gram in [self._outputs] if gram is not None]
        return found[0] if len(found) == 1 else (found[0] + found[1]).div_(2)


def _solved(gram: Tensor, target: Tensor, ridge: float, label: str) -> Tensor:
    """``(G + r I)^+ target``, directions that no task vector has left out."""
    size = float(gram.diagonal().mean())
    if not size < float("inf"):
        raise NonFiniteError("a delta holds a NaN or an infinity", where=label or None)
    if size == 0:
        return torch.zeros_like(target)
    values, vectors = torch.linalg.eigh(gram)
    # Squares of singular values: what rounding of their sums leaves is not a direction.
    kept = values > float(values[-1]) * 1e-13 * len(values)
    scaled = (vectors[:, kept].T @ target).div_((values[kept] + ridge * size).unsqueeze(1))
    return torch.mm(vectors[:, kept], scaled)
