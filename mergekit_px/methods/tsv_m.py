"""Task singular vectors, merged."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from mergekit_px.methods.matrices import PAPER, Case, Count, MatrixMerge, NoiseParams, component_count, matrix_method

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.svd import SVD


class TsvMParams(NoiseParams):
    rank: Count | None = None
    """Components of each source, a number or a percentage of the rank; an equal share of the rank if left out."""


@matrix_method(
    paper="arXiv:2412.00081", scratch=4.5, presets={"paper": {**PAPER, "noise_floor": False}}, uses_base=True
)
def tsv_m(case: Case, params: TsvMParams) -> MatrixMerge:
    """Orthogonalise the leading singular vectors of the sources and sum them (TSV-M, task singular vectors).

    For an (m, n) matrix and T sources, the ``k = floor(min(m, n) / T)`` leading components ``U_t, s_t, V_t`` of each
    ``w_t D_t`` are stacked to ``U, s, V``, and the merged delta is ``polar(U) diag(s) polar(V)'`` (Gargiulo et
    al.). Components beyond a source's numerical rank, or within the rounding noise of 16-bit checkpoints, are left
    out. All other tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` (alpha) multiplies
    everything.
    """
    import torch

    from mergekit_px.kernels.pool import orthogonalised

    found = yield from leading_components(case, params.rank, params.noise_floor)
    values = torch.cat([parts.s for parts in found])
    return orthogonalised([one.u for one in found], values, [one.v for one in found], case.label, case.notes).dense()


def leading_components(
    case: Case, rank: int | str | None, noise_floor: bool
) -> Generator[None, list[torch.Tensor], list[SVD]]:
    """One round: the components of each source that its rank has room for and that stand above noise."""
    count = max(1, case.rank // case.count) if rank is None else component_count(rank, case.rank)
    found = []
    for source in range(case.count):
        parts = case.svd((yield).pop(), count)
        edge = case.edge(source) if noise_floor else 0.0
        found.append(parts.leading(case.above(parts.s, edge, f"source {source + 1}")))
    return found
