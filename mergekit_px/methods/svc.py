"""Singular value calibration, a correction of any merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, merge_matrices

if TYPE_CHECKING:
    import torch


class SvcParams(SpectralParams):
    floor: Annotated[float, Field(gt=0)] | None = None
    """Least response of a source (c), so 1/c is the largest growth; 1 over their number if left out, 1 suits a merge
    by TSV-M."""


@merge_method(
    family="spectral",
    space="deltas",
    access="tensor",
    centred=True,
    paper="arXiv:2602.05536",
    sources=(2, None),
    scratch=9.0,
    presets={"paper": {"stack": "mean"}},
)
def svc(deltas: Sequence[torch.Tensor], params: SvcParams, name: str) -> torch.Tensor:
    """Calibrate the singular values of a merge by those of its sources (SVC, singular value calibration).

    The first source is the merge (usually another step), the others are its T sources. With the merge's delta
    ``M = U diag(s) V'``, ``a = U'M`` and ``a_i = U'D_i``, each ``s_j`` is divided by the mean over i of
    ``max(c, <a_j, a_ij> / ||a_ij||^2)``, ``c = 1/T`` by default: directions that several sources share are
    over-counted and shrink, those that the merge has lost grow. All other tensors, and embeddings unless wanted,
    stay as the merge has them. ``scale`` multiplies everything.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _svc(case, params)

    return merge_matrices(deltas, [1.0] * len(deltas), params, merge, name=name, otherwise="first")


def _svc(case: Case, params: SvcParams) -> MatrixMerge:
    from mergekit_px.kernels.calibration import Calibration

    experts = case.count - 1
    merged = (yield).pop()
    calibration = Calibration(merged, params.floor or 1 / experts, case.label)
    for _ in range(experts):
        calibration.add((yield).pop())
    calibrated = calibration.result()
    case.note_growth(merged, calibrated, "calibration")
    return calibrated
