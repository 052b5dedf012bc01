"""The leading components of all sources, pooled (AXIS, stage 1)."""

from __future__ import annotations

from typing import Literal

from mergekit_px.methods.matrices import Case, Count, MatrixMerge, SpectralParams, component_count, matrix_method


class SvdParams(SpectralParams):
    top_k: Count = "10%"
    """Components kept of all sources together for each matrix: a number, or a percentage of the rank. The default is
    the paper's; where it was measured (docs/quality.md), 100% kept 5 to 10 points more of the fine-tunes than 20%."""
    pool: Literal["matrix", "quota", "normalised"] = "matrix"
    """Which are kept: the largest of all; as many of each source; the largest relative to their source's norm."""
    orthogonalise: bool = True
    """Make the pooled vectors orthonormal before they are summed (as TSV-M does). Off, the plain sum of the paper,
    which is meant to be tuned and over-shoots as it is."""
    calibrate: Literal["none", "svc"] = "none"
    """Calibrate the singular values of the result by the sources (the method svc), which are then read twice. It
    lengthens an orthogonalised sum: where that was measured (docs/quality.md) it wanted half the scale."""


@matrix_method(
    paper="arXiv:2508.19353",
    scratch=6.0,
    overshoots=lambda params: (
        None if params.orthogonalise or params.calibrate == "svc" or params.recover else "adds them up"
    ),
)
def svd(case: Case, params: SvdParams) -> MatrixMerge:
    """Pool the rank-one components of all sources and keep the K largest of each matrix (AXIS).

    Each ``w_t D_t = sum_j s_tj u_tj v_tj'`` gives its components to one pool per matrix; the K with the largest
    ``s`` are kept, and the merged delta is their sum (Osial et al., without the tuning that follows
    there), or with ``orthogonalise`` ``polar(U) diag(s) polar(V)'`` of the stacked vectors, which removes what the
    sources' components count twice. K above the number of components keeps all; then the plain sum is task
    arithmetic. All other tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies
    everything.
    """
    from mergekit_px.kernels.calibration import Calibration
    from mergekit_px.kernels.pool import ComponentPool

    pool = ComponentPool(component_count(params.top_k, case.rank), params.pool, case.label)
    for _ in range(case.count):
        pool.add((yield).pop())
    merged = (pool.orthogonalised() if params.orthogonalise else pool.sum()).dense()
    case.notes += pool.notes
    if params.calibrate == "none":
        return merged
    calibration = Calibration(merged, 1 / case.count, case.label)
    for _ in range(case.count):
        calibration.add((yield).pop())
    calibrated = calibration.result()
    case.note_growth(merged, calibrated, "calibration")
    return calibrated
