"""Task singular vectors, merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import PAPER, Case, Count, MatrixMerge, NoiseParams, component_count, merge_matrices

if TYPE_CHECKING:
    import torch


class TsvMParams(NoiseParams):
    rank: Count | None = None
    """Components of each source, a number or a percentage of the rank; an equal share of the rank if left out."""


@merge_method(
    family="spectral",
    space="deltas",
    access="tensor",
    centred=True,
    paper="arXiv:2412.00081",
    scratch=4.5,
    presets={"paper": {**PAPER, "noise_floor": False}},
)
def tsv_m(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: TsvMParams,
    load_base: Callable[[], torch.Tensor] | None,
    name: str,
) -> torch.Tensor:
    """Orthogonalise the leading singular vectors of the sources and sum them (TSV-M, task singular vectors).

    For an (m, n) matrix and T sources, the ``k = floor(min(m, n) / T)`` leading components ``U_t, s_t, V_t`` of each
    ``w_t D_t`` are stacked to ``U, s, V``, and the merged delta is ``polar(U) diag(s) polar(V)'`` (Gargiulo et
    al.). Components beyond a source's numerical rank, or within the rounding noise of 16-bit checkpoints, are left
    out. All other tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` (alpha) multiplies
    everything.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _tsv_m(case, params)

    return merge_matrices(deltas, weights, params, merge, name=name, load_base=load_base)


def _tsv_m(case: Case, params: TsvMParams) -> MatrixMerge:
    import torch

    from mergekit_px.kernels.pool import orthogonalised

    rank = max(1, case.rank // case.count) if params.rank is None else component_count(params.rank, case.rank)
    us, values, vs = [], [], []
    for source in range(case.count):
        parts = case.svd((yield).pop(), rank)
        edge = case.edge(source) if params.noise_floor else 0.0
        parts = parts.leading(case.above(parts.s, edge, f"source {source + 1}"))
        us.append(parts.u)
        values.append(parts.s)
        vs.append(parts.v)
        del parts
    return orthogonalised(us, torch.cat(values), vs, case.label, case.notes).dense()
