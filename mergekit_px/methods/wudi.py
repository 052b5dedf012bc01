"""Whoever started the interference should end it: data-free least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, merge_matrices

if TYPE_CHECKING:
    import torch


class WudiParams(SpectralParams):
    solver: Literal["adam", "exact"] = "adam"
    """The steps of the paper, which stop well before the minimum; or the minimum itself, which is an experiment."""
    steps: Annotated[int, Field(ge=0)] = 300
    """Steps of Adam."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Step size of Adam."""


@merge_method(space="deltas", access="tensor", paper="arXiv:2503.08099", scratch=14.0)
def wudi(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: WudiParams, name: str) -> torch.Tensor:
    """Find the update whose differences to the sources' updates do least along the inputs that those span.

    For an (m, n) matrix, minimise ``sum_t ||(X - D_t) D_t'||^2 / ||D_t||^2`` over X with Adam, beginning at
    ``sum_t D_t`` (Cheng et al.). The gradient is ``2 (X G - C)`` with ``G = sum_t D_t'D_t / ||D_t||^2``
    and ``C = sum_t D_t D_t'D_t / ||D_t||^2``, so a step costs one product however many sources there are; the exact
    minimum is ``C G^+``. A weight multiplies its source's delta first. All other tensors, and embeddings unless
    wanted, get the mean of the deltas. ``scale`` multiplies everything. Holds two (n, n) matrices: convolutions and
    layers with many inputs are expensive.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _wudi(case, params)

    return merge_matrices(deltas, weights, params, merge, name=name)


def _wudi(case: Case, params: WudiParams) -> MatrixMerge:
    import torch

    from mergekit_px.errors import NonFiniteError
    from mergekit_px.kernels.orthonormal import squared_norm

    exact = params.solver == "exact"
    total: torch.Tensor | None = None
    for _ in range(case.count):
        given = yield
        # The minimum divides by small eigenvalues; the steps never do.
        delta = given.double() if exact else given
        if total is None:
            total, target = torch.zeros_like(delta), torch.zeros_like(delta)
            metric = delta.new_zeros((delta.shape[1], delta.shape[1]))
        size = squared_norm(delta)
        if not math.isfinite(size):
            raise NonFiniteError("a delta holds a NaN or an infinity", where=case.label)
        total += delta
        if size > 0:
            unit = delta / math.sqrt(size)
            metric.addmm_(unit.T, unit)
            target.addmm_(delta @ unit.T, unit)
    assert total is not None
    return _minimum(metric, target).to(given.dtype) if exact else _adam(total, metric, target, params)


def _minimum(metric: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    import torch

    values, vectors = torch.linalg.eigh(metric)
    # Deltas of lower rank leave null directions, in which the least-norm minimum is zero.
    kept = values > 1e-12 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    found: torch.Tensor = (target @ (vectors / values)) @ vectors.T
    return found


def _adam(current: torch.Tensor, metric: torch.Tensor, target: torch.Tensor, params: WudiParams) -> torch.Tensor:
    """Kingma and Ba, algorithm 1, with its default constants."""
    first, second = current.new_zeros(current.shape), current.new_zeros(current.shape)
    for step in range(1, params.steps + 1):
        gradient = (current @ metric).sub_(target).mul_(2)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        current.addcdiv_(first, denominator, value=-params.learning_rate / (1 - 0.9**step))
    return current
