"""OPCM: one source after another, each without what the merge so far has a say in."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method


class OpcmParams(SpectralParams):
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the sum of the singular values of the merge so far whose directions are kept free of later sources
    (alpha)."""


@matrix_method(paper="arXiv:2501.09522", scratch=12.0)
def opcm(case: Case, params: OpcmParams) -> MatrixMerge:
    """Add source after source, each free of the leading directions so far (OPCM, continual merging by projection).

    For a matrix, ``M = D_1`` at first. With ``M = U diag(s) V'`` and k the number of leading values whose sum first
    exceeds ``threshold`` of the whole, each further ``D_t`` loses ``U_k U_k' D_t V_k V_k'`` and the parts along
    ``u_j v_j'`` of the other components, and is added to M. In the end M gets the mean of the norms of the sources
    (Tang et al.; they bring the model to that norm as a whole, here each matrix has its own). Order matters, and memory
    does not grow with the number of sources. A weight multiplies its source's delta first. All other tensors, and
    embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything.
    """
    from mergekit_px.kernels.orthonormal import squared_norm

    merged = (yield).pop().clone()
    length = math.sqrt(squared_norm(merged)) / case.count
    for _ in range(case.count - 1):
        delta = (yield).pop()
        length += math.sqrt(squared_norm(delta)) / case.count
        parts = case.svd(merged)
        running = parts.s.double().cumsum(0)
        kept = int((running <= params.threshold * running[-1]).sum()) if parts.rank else 0
        shared = parts.u.T @ delta @ parts.v
        along = shared.diagonal().clone()
        shared = shared[:kept, :kept]
        along[:kept] = 0
        merged += delta
        merged -= parts.u[:, :kept] @ shared @ parts.v[:, :kept].T
        merged -= (parts.u * along) @ parts.v.T
        del delta, parts
    size = math.sqrt(squared_norm(merged))
    return merged.mul_(length / size) if size > 0 else merged
