"""ACTMat: least squares on the activations that task vectors stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, merge_matrices

if TYPE_CHECKING:
    import torch


class ActmatParams(SpectralParams):
    ridge: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Damping, in shares of the mean of the diagonals: 0 for the exact solution."""
    sides: Literal["inputs", "outputs", "both"] = "inputs"
    """Whose Gram matrices are estimated; of both sides the two solutions are averaged."""


@merge_method(family="spectral", space="deltas", access="tensor", centred=True, paper="arXiv:2604.01329", scratch=20.0)
def actmat(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: ActmatParams, name: str) -> torch.Tensor:
    """Regression mean with the Gram matrices of the task vectors in place of data (ACTMat).

    For an (m, n) matrix ``X = (sum_t D_t G_t) (sum_t G_t)^+`` with ``G_t = D_t'D_t``, in float64. ``sides: outputs``
    solves ``(sum_t H_t)^+ sum_t H_t D_t`` with ``H_t = D_t D_t'`` instead. A weight multiplies its source's delta
    first. With a ``ridge`` r, r times the mean of its diagonal is added to the diagonal of the sum; on the project's
    own digits the exact solution was behind TSV-M, and ridges of 0.01 to 0.1 and both sides came near it. All other
    tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything. Holds (n, n)
    or (m, m) matrices.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _actmat(case, params)

    return merge_matrices(deltas, weights, params, merge, name=name)


def _actmat(case: Case, params: ActmatParams) -> MatrixMerge:
    from mergekit_px.kernels.interference import SelfRegression

    regression: SelfRegression | None = None
    for _ in range(case.count):
        delta = (yield).pop()
        if regression is None:
            regression = SelfRegression(case.shape, delta, params.sides, case.label)
        regression.add(delta, 1.0)
    assert regression is not None
    return regression.solved(params.ridge).to(delta.dtype)
