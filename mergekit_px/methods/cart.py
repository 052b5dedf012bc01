"""Centred low-rank task arithmetic."""

from __future__ import annotations

from mergekit_px.methods.matrices import (
    Case,
    Count,
    MatrixMerge,
    SpectralParams,
    component_count,
    matrix_method,
    sum_of,
)


class CartParams(SpectralParams):
    rank: Count = "16%"
    """Components of each source's distance to the mean, a number or a percentage of the rank."""


@matrix_method(paper="arXiv:2412.12153", scratch=10.0, scale=1.0)
def cart(case: Case, params: CartParams) -> MatrixMerge:
    """Mean of the sources plus the low-rank part of each source's distance to it (CART, centred arithmetic).

    With ``C = mean_t w_t D_t``, the merged delta of a matrix is ``C + scale * sum_t SVD_k(w_t D_t - C)`` (Choi et
    al.). The base cancels: with weights of 1 the result depends on the sources alone, so none need be known.
    All other tensors, and embeddings unless wanted, get the mean, whatever the scale (lambda, searched for in the
    paper). The sources are read twice.
    """
    centre = (yield from sum_of(case)).div_(case.count)
    merged = centre.clone()
    for _ in range(case.count):
        distance = (yield).pop() - centre
        parts = case.svd(distance, component_count(params.rank, case.rank))
        merged.addmm_(parts.u * parts.s, parts.v.T, alpha=params.scale)
        del distance, parts
    return merged
