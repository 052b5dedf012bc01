"""Isotropic merging: in the common subspace (Iso-C), and in that and task-specific ones (Iso-CTS)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from mergekit_px.methods.matrices import PAPER, Case, MatrixMerge, NoiseParams, matrix_method, sum_of


@matrix_method(
    paper="arXiv:2502.04959", scratch=3.5, presets={"paper": {**PAPER, "noise_floor": False}}, uses_base=True
)
def iso_c(case: Case, params: NoiseParams) -> MatrixMerge:
    """Flatten the singular values of the summed task vectors (isotropic merging, Iso-C).

    With ``sum_t w_t D_t = U diag(s) V'``, the merged delta is ``mean(s) U V'`` (Marczak et al.). Mean and
    product run over the numerical rank, and over what exceeds the rounding noise of 16-bit checkpoints: the others
    are directions without meaning, which would get the same singular value. All other tensors, and embeddings unless
    wanted, get the mean of the deltas. ``scale`` (alpha) multiplies everything; the paper finds 1.3, 1.0 and 0.9
    best for 8, 14 and 20 vision tasks.
    """
    from mergekit_px.kernels.polar import polar_factor

    total = yield from sum_of(case)
    edge = case.sum_edge()
    polar = polar_factor(total, floor=edge if params.noise_floor else 0.0, overwrite=True, label=case.label)
    if polar.rank == 0 and bool(total.any()):
        case.notes.append("the sum does not exceed rounding noise; nothing was clipped")
        polar = polar_factor(total, overwrite=True, label=case.label)
    elif not params.noise_floor and polar.values is not None and (below := int((polar.values <= edge).sum())):
        case.notes.append(f"{below} of {polar.rank} components lie below rounding noise ({edge:.2g}) and are amplified")
    case.notes += polar.notes
    return polar.factor.mul_(polar.mean_value)


class IsoCtsParams(NoiseParams):
    common: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the rank given to the leading directions of the sum; the rest is shared out among the sources."""


def specific_count(rank: int, sources: int, common: float) -> int:
    """Directions of each source: its part of what the common subspace leaves, rounded."""
    return min(round((rank - int(rank * common)) / sources), rank // sources)


@matrix_method(
    paper="arXiv:2502.04959", scratch=12.0, presets={"paper": {**PAPER, "noise_floor": False}}, uses_base=True
)
def iso_cts(case: Case, params: IsoCtsParams) -> MatrixMerge:
    """Isotropic merging of common and task-specific subspaces (Iso-CTS).

    For an (m, n) matrix of largest rank r, ``U_k, s_k, V_k`` are the leading ``k`` components of ``sum_t w_t D_t``,
    and ``P_t, e_t, Q_t`` the leading ``q`` components of ``w_t D_t - U_k U_k' w_t D_t``, with ``q`` the T-th part of
    ``(1 - common) r``, rounded, and ``k = r - q T``. The merged delta is ``mean(s_k, e_1 .. e_T)
    polar([U_k, P_1 .. P_T]) polar([V_k, Q_1 .. Q_T])'`` (Marczak et al.). Components beyond the
    numerical rank or within the rounding noise of 16-bit checkpoints are left out. All other tensors, and embeddings
    unless wanted, get the mean of the deltas. ``scale`` (alpha) multiplies everything; the paper finds 1.5, 1.2 and
    1.1 best for 8, 14 and 20 vision tasks. The sources are read twice.
    """
    import torch

    from mergekit_px.kernels.orthonormal import squared_norm
    from mergekit_px.kernels.pool import orthogonalised
    from mergekit_px.kernels.spectra import null_floor

    own = specific_count(case.rank, case.count, params.common)
    total = yield from sum_of(case)
    parts = case.svd(total, case.rank - own * case.count)
    del total
    edge = case.sum_edge() if params.noise_floor else 0.0
    common = parts.leading(case.above(parts.s, edge, "the sum"))
    us, values, vs = [common.u], [common.s], [common.v]
    for source in range(case.count):
        delta = (yield).pop()
        rest = case.svd(delta - common.u @ (common.u.T @ delta), own)
        # Where the common subspace holds all of a source, the rest is rounding error of the subtraction.
        floor = null_floor(delta.dtype) * math.sqrt(squared_norm(delta))
        edge = case.edge(source) if params.noise_floor else 0.0
        rest = rest.leading(int((rest.s > max(edge, floor)).sum()))
        del delta
        us.append(rest.u)
        values.append(rest.s)
        vs.append(rest.v)
    s = torch.cat(values)
    if len(s) == 0:
        return common.u.new_zeros(case.shape)
    del common, parts, rest, values
    return orthogonalised(us, s.mean().expand_as(s), vs, case.label, case.notes).dense()
