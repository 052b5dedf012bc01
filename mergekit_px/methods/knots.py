"""KnOTS: merge task vectors by sign in a basis that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.matrices import Case, MatrixMerge, SpectralParams, matrix_method

if TYPE_CHECKING:
    import torch


class KnotsParams(SpectralParams):
    density: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of each source's elements that takes part, the largest in the shared basis."""


@matrix_method(paper="arXiv:2410.19735", scratch=16.0)
def knots(case: Case, params: KnotsParams) -> MatrixMerge:
    """TIES in the left singular basis that the sources share (KnOTS, knowledge orientation through SVD).

    For an (m, n) matrix, ``[D_1 .. D_T] = U diag(s) [V_1 .. V_T]'``; the parts ``P_t = diag(s) V_t' = U' D_t`` are
    merged by TIES: the ``density`` largest elements of each stay, an element's sign is that of their sum, and those
    that have it are averaged; then U turns the result back (Stoica et al.). A weight multiplies its source's delta
    first. Elements are trimmed in each matrix alone; the authors trim over all layers together. Written for LoRA,
    where ``adapter merge --space knots`` works on the factors; here for whole fine-tunes. All other tensors, and
    embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything. The sources are read three
    times; holds an (m, m) matrix.
    """
    import torch

    from mergekit_px.errors import NonFiniteError
    from mergekit_px.kernels.orthonormal import gram
    from mergekit_px.methods.pruning import kept_count

    metric: torch.Tensor | None = None
    for _ in range(case.count):
        delta = (yield).pop()
        metric = gram(delta.T) if metric is None else metric + gram(delta.T)
    assert metric is not None
    if not bool(metric.isfinite().all()):
        raise NonFiniteError("a delta holds a NaN or an infinity", where=case.label)
    values, vectors = torch.linalg.eigh(metric)
    kept = values > float(values[-1]) * 1e-13 * len(values)
    basis = vectors[:, kept].to(delta.dtype)
    del metric, vectors
    count = kept_count(params.density, basis.shape[1] * case.shape[1])

    def trimmed(delta: torch.Tensor) -> torch.Tensor:
        part = basis.T @ delta
        cut = part.abs().flatten().kthvalue(part.numel() - count + 1).values if part.numel() else part
        return torch.where(part.abs() >= cut, part, 0.0)

    sign = delta.new_zeros((basis.shape[1], case.shape[1]))
    for _ in range(case.count):
        sign += trimmed((yield).pop())
    sign.sign_()
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for _ in range(case.count):
        part = trimmed((yield).pop())
        agrees = (part.sign() == sign) & (part != 0)
        total += part * agrees
        agreeing += agrees
    return torch.mm(basis, total.div_(agreeing.clamp_(min=1)))
