"""Isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import PAPER, Case, MatrixMerge, NoiseParams, merge_matrices, sum_of

if TYPE_CHECKING:
    import torch


class IsoCtsParams(NoiseParams):
    common: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the rank given to the leading directions of the sum; the rest is shared out among the sources."""


@merge_method(
    family="spectral",
    space="deltas",
    access="tensor",
    centred=True,
    paper="arXiv:2502.04959",
    scratch=12.0,
    presets={"paper": {**PAPER, "noise_floor": False}},
)
def iso_cts(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: IsoCtsParams,
    load_base: Callable[[], torch.Tensor] | None,
    name: str,
) -> torch.Tensor:
    """Isotropic merging of common and task-specific subspaces (Iso-CTS).

    For an (m, n) matrix of largest rank r, ``U_k, s_k, V_k`` are the leading ``k`` components of ``sum_t w_t D_t``,
    and ``P_t, e_t, Q_t`` the leading ``q`` components of ``w_t D_t - U_k U_k' w_t D_t``, with ``q`` the T-th part of
    ``(1 - common) r``, rounded, and ``k = r - q T``. The merged delta is ``mean(s_k, e_1 .. e_T)
    polar([U_k, P_1 .. P_T]) polar([V_k, Q_1 .. Q_T])'`` (Marczak et al.). Components beyond the
    numerical rank or within the rounding noise of 16-bit checkpoints are left out. All other tensors, and embeddings
    unless wanted, get the mean of the deltas. ``scale`` (alpha) multiplies everything; the paper finds 1.5, 1.2 and
    1.1 best for 8, 14 and 20 vision tasks. The sources are read twice.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _iso_cts(case, params)

    return merge_matrices(deltas, weights, params, merge, name=name, load_base=load_base)


def specific_count(rank: int, sources: int, common: float) -> int:
    """Directions of each source: its part of what the common subspace leaves, rounded."""
    return min(round((rank - int(rank * common)) / sources), rank // sources)


def _iso_cts(case: Case, params: IsoCtsParams) -> MatrixMerge:
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
