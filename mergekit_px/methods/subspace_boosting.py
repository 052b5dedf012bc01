"""Subspace boosting."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mergekit_px.methods.matrices import Case, MatrixMerge, NoiseParams, matrix_method, sum_of


class SubspaceBoostingParams(NoiseParams):
    beta: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the sum of the singular values at which lifting begins; 0 lifts everything to the largest."""


@matrix_method(
    paper="arXiv:2506.16506",
    scratch=8.0,
    overshoots=lambda params: None if params.recover else "adds them up and strengthens what is weak in the sum",
    uses_base=True,
)
def subspace_boosting(case: Case, params: SubspaceBoostingParams) -> MatrixMerge:
    """Raise the small singular values of a sum of task vectors, or of one merge (Subspace Boosting).

    With ``sum_t w_t D_t = U diag(s) V'`` and c the first index at which ``(s_1 + .. + s_c) / sum(s) >= beta``, every
    ``s_j`` below ``s_c`` becomes ``s_c``. Given the result of another step as its only source, it boosts any merge
    (TIES, consensus); given several, it boosts task arithmetic. Components beyond the numerical rank or within the
    rounding noise of 16-bit checkpoints keep their values. Fused query, key and value want ``split: 3``. All other
    tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything.
    """
    total = yield from sum_of(case)
    parts = case.svd(total)
    if parts.rank == 0:
        return total
    running = parts.s.double().cumsum(0)
    strong = min(int((running < params.beta * float(running[-1])).sum()), parts.rank - 1)
    edge = case.sum_edge()
    lifted = case.above(parts.s, edge, "the sum") if params.noise_floor else parts.rank
    if not params.noise_floor and (below := int((parts.s <= edge).sum())):
        case.notes.append(f"{below} of {parts.rank} components lie below rounding noise ({edge:.2g}) and are amplified")
    values = parts.s.clone()
    values[:lifted].clamp_min_(float(parts.s[strong]))
    case.note_growth(parts.s, values, "boosting")
    return (parts.u * values) @ parts.v.T
