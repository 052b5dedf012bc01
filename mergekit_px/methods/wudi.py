"""Whoever started the interference should end it: data-free least squares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.actmat import Sides, self_regression
from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method

if TYPE_CHECKING:
    import torch


class WudiParams(SpectralParams):
    steps: Annotated[int, Field(ge=0)] = 300
    """Steps of Adam."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Step size of Adam."""
    solver: Literal["adam", "closed"] = "adam"
    """Few steps of Adam, as in the paper, or the minimum itself in closed form."""
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-2
    """Damping of the closed form, in shares of the mean of the diagonals: 0 for the exact minimum."""
    sides: Sides = "inputs"
    """Of the closed form: interference with the tasks' inputs, with their outputs, or the mean of both solutions."""


@matrix_method(
    paper="arXiv:2503.08099",
    scratch=20.0,
    presets={"paper": {"stack": "mean"}},
)
def wudi(case: Case, params: WudiParams) -> MatrixMerge:
    """Minimise the interference between task vectors without data (WUDI).

    For an (m, n) matrix, minimise ``sum_t ||(X - D_t) D_t'||^2 / ||D_t||^2`` over X with Adam, beginning at
    ``sum_t D_t`` (Cheng et al.). The gradient is ``2 (X G - C)`` with ``G = sum_t D_t'D_t / ||D_t||^2`` and
    ``C = sum_t D_t D_t'D_t / ||D_t||^2``, so a step costs one product however many sources there are. The few small
    steps of the paper stop well before the minimum, on purpose; where updates are larger than they can move, the sum
    stays, and a warning says so. ``solver: closed`` gives ``X = C (G + r I)^+``, the
    minimum where the ridge is 0, and ``sides: both`` its mean with the solution for ``||D_t' (X - D_t)||^2``; on the
    project's own digits the exact minimum was behind TSV-M, a ridge of 0.01 to 0.1 and both sides came near it. A
    weight multiplies its source's delta first. All other tensors, and embeddings unless wanted, get the mean of the
    deltas. ``scale`` multiplies everything. Holds an (n, n) matrix: convolutions and layers with many inputs are
    expensive.
    """
    import torch

    from mergekit_px.errors import NonFiniteError
    from mergekit_px.kernels.orthonormal import squared_norm

    if params.solver == "closed":
        return (yield from _closed(case, params))
    total: torch.Tensor | None = None
    for _ in range(case.count):
        delta = (yield).pop()
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
            del unit
    assert total is not None
    del delta
    reach, size = params.steps * params.learning_rate, float(total.abs().mean())
    if params.steps and reach < size:
        case.notes.append(
            f"{params.steps} steps of {params.learning_rate:g} move an element by {reach:.2g} at most, and those of the"
            f" sum are {size:.2g} on average: it stays near the sum, which can overshoot; try --solver closed"
        )
    return _adam(total, metric, target, params)


def _closed(case: Case, params: WudiParams) -> MatrixMerge:
    from mergekit_px.kernels.orthonormal import squared_norm

    def inverse_size(delta: torch.Tensor) -> float:
        size = squared_norm(delta)
        return 1 / size if size else 0.0

    return (yield from self_regression(case, params.sides, params.ridge, inverse_size))


def _adam(current: torch.Tensor, metric: torch.Tensor, target: torch.Tensor, params: WudiParams) -> torch.Tensor:
    """Kingma and Ba, algorithm 1, with its default constants."""
    import torch

    first, second = torch.zeros_like(current), torch.zeros_like(current)
    work = torch.empty_like(current)
    for step in range(1, params.steps + 1):
        torch.mm(current, metric, out=work).sub_(target).mul_(2)
        first.lerp_(work, 0.1)
        second.mul_(0.999).addcmul_(work, work, value=0.001)
        torch.div(second, 1 - 0.999**step, out=work).sqrt_().add_(1e-8)
        current.addcdiv_(first, work, value=-params.learning_rate / (1 - 0.9**step))
    return current
