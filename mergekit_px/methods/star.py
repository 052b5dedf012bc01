"""Spectral truncation and rescale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method

if TYPE_CHECKING:
    import torch


class StarParams(SpectralParams):
    eta: Annotated[float, Field(gt=0, le=100)] = 40.0
    """Percentage of the sum of each source's singular values that is kept."""


@matrix_method(paper="arXiv:2502.10339", scratch=10.0)
def star(case: Case, params: StarParams) -> MatrixMerge:
    """Mean of the sources' low-rank parts, rescaled to their nuclear norm (STAR, spectral truncation and rescale).

    Of each matrix ``w_t D_t = U diag(s) V'`` the fewest leading components whose values add up to ``eta`` percent of
    ``sum(s)`` are kept and multiplied by ``sum(s) / sum(kept s)``; the merged delta is the mean over the sources.
    All other tensors, and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything.
    """
    import torch

    merged: torch.Tensor | None = None
    for _ in range(case.count):
        delta = (yield).pop()
        if merged is None:
            merged = torch.zeros_like(delta)
        parts = case.svd(delta)
        del delta
        if parts.rank == 0:
            continue
        running = parts.s.double().cumsum(0)
        total = float(running[-1])
        # The last sum is the total itself, whatever the rounding.
        kept = min(int((running < total * params.eta / 100).sum()) + 1, parts.rank)
        gain = total / float(running[kept - 1])
        merged.addmm_(parts.u[:, :kept] * parts.s[:kept], parts.v[:, :kept].T, alpha=gain / case.count)
        del parts
    assert merged is not None
    return merged
