"""OrthoMerge: turn the base as the sources turn it, and add what turning does not explain."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from mergekit_px.errors import UsageError
from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method, sum_of


class OrthoMergeParams(SpectralParams):
    rotations: Literal["conflicts", "whole"] = "conflicts"
    """What a source's rotation is fitted to: its rows that point away from the mean change, or all of them."""
    residual: FiniteFloat = 1.0
    """Factor of the mean of what the rotations leave."""
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """How far rotations are drawn towards doing nothing; decides along inputs that the base does not use."""


@matrix_method(paper="arXiv:2602.05943", scratch=32.0, centred=False, uses_base=True)
def ortho_merge(case: Case, params: OrthoMergeParams) -> MatrixMerge:
    """Merge the rotations of the base in their Lie algebra, and what is left by its mean (OrthoMerge).

    For an (m, n) matrix W of the base, ``R_t`` is the orthogonal matrix with ``W R_t`` nearest to ``W + c_t D_t``,
    where ``c_t`` keeps the rows of ``D_t`` whose dot product with the mean change is negative (conflict-aware), or all.
    By Cayley's map ``R_t`` becomes a skew ``A_t``; the sum of these, brought to the mean of their norms, becomes the
    rotation R. The result is ``W R + residual * mean_t (W + w_t D_t - W R_t)`` (Yang et al.; their code adds 0.2 times
    the sum of five residuals, which is their mean). A weight multiplies its source's delta first. All other tensors,
    and embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies the whole change. In float64; holds
    several (n, n) matrices, and its cost grows with n^3.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
        UsageError: there is no base to turn.
    """
    import torch

    from mergekit_px.kernels.polar import procrustes_rotation, rotation_of, skew_of

    if case.load_base is None:
        raise UsageError("ortho_merge turns the base, and there is none", hint="give it as base (--base)")
    base = case.load_base().double()
    total = (yield from sum_of(case)).double()
    skews = base.new_zeros((base.shape[1], base.shape[1]))
    turned, strength = torch.zeros_like(skews), 0.0
    for _ in range(case.count):
        delta = (yield).pop()
        dtype, change = delta.dtype, delta.double()
        if params.rotations == "conflicts":
            change = change * ((change * total).sum(dim=1, keepdim=True) < 0)
        rotation = procrustes_rotation(base, base + change, params.ridge, case.label)
        skew = skew_of(rotation)
        skews += skew
        strength += float(torch.linalg.vector_norm(skew)) / case.count
        turned += rotation
        del delta, change, rotation, skew
    length = float(torch.linalg.vector_norm(skews))
    merged = base @ rotation_of(skews * (strength / length if length > 1e-8 else 0.0)) - base
    left = (total + case.count * base - base @ turned) / case.count
    return merged.add_(left, alpha=params.residual).to(dtype)
