"""ACTMat: least squares on the activations that task vectors stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method

if TYPE_CHECKING:
    import torch

Sides = Literal["inputs", "outputs", "both"]


class ActmatParams(SpectralParams):
    ridge: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Damping, in shares of the mean of the diagonals: 0 for the exact solution."""
    sides: Sides = "inputs"
    """Whose Gram matrices are estimated; of both sides the two solutions are averaged."""


@matrix_method(paper="arXiv:2604.01329", scratch=20.0)
def actmat(case: Case, params: ActmatParams) -> MatrixMerge:
    """Regression mean with the Gram matrices of the task vectors in place of data (ACTMat).

    For an (m, n) matrix ``X = (sum_t D_t G_t) (sum_t G_t)^+`` with ``G_t = D_t'D_t``, in float64. ``sides: outputs``
    solves ``(sum_t H_t)^+ sum_t H_t D_t`` with ``H_t = D_t D_t'`` instead. A weight multiplies its source's delta
    first. With a ``ridge`` r, r times the mean of its diagonal is added to the diagonal of the sum; on the project's
    own digits the exact solution was behind TSV-M, and ridges of 0.01 to 0.1 and both sides came near it. All other
    tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything. Holds (n, n)
    or (m, m) matrices.
    """
    return (yield from self_regression(case, params.sides, params.ridge, lambda delta: 1.0))


def self_regression(case: Case, sides: Sides, ridge: float, weigh: Callable[[torch.Tensor], float]) -> MatrixMerge:
    """One round: the least squares of all sources, each times what ``weigh`` gives for its delta."""
    from mergekit_px.kernels.interference import SelfRegression

    regression: SelfRegression | None = None
    for _ in range(case.count):
        delta = (yield).pop()
        if regression is None:
            regression = SelfRegression(case.shape, delta, sides, case.label)
        regression.add(delta, weigh(delta))
    assert regression is not None
    return regression.solved(ridge).to(delta.dtype)
