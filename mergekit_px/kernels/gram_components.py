"""The polar decomposition of a float32 matrix by products and one symmetric eigenproblem in float32.

``A'A = V diag(s^2) V'`` costs half of what a decomposition of A does, but loses directions whose singular value is
below the square root of the precision. So those are decomposed once more by themselves, on their own scale: A times
their basis is a matrix whose largest singular value is a hundredth of that of A, and the same applies to it again.
What the rounding of the eigenvectors leaves between the left vectors is removed to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.kernels.orthonormal import gram, unit_gram
from mergekit_px.kernels.product import fast_gram, product

_SMALL = 1e-2
"""Singular values below this part of the largest are decomposed on their own scale."""

_FEW = 256
"""So many components are decomposed in float64 at once: nothing is faster."""

_ROUNDS = 4
_GOOD = 1e-3
"""Overlap of the left vectors whose square does not matter."""

_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Components:
    """``u @ diag(s) @ v.T``, all n components or those above a floor, in no particular order."""

    u: Tensor
    s: Tensor
    """float64"""
    v: Tensor
    overlap: float
    """Largest column norm of ``U'U - I`` before the last correction, which leaves its square."""

    @property
    def converged(self) -> bool:
        return self.overlap <= _GOOD


def gram_components(tall: Tensor, floor: float = 0.0, relative: float = 0.0) -> Components:
    """Components of an (m, n) float32 matrix with m >= n, such that ``U V'`` is its polar factor.

    The polar factor is as near as that of a float32 decomposition. ``U diag(s) V'`` restores the matrix to a few
    1e-5 only, since the rounding of the eigenvectors stays in V.

    Args:
        tall: not zero.
        floor: components up to this are left out.
        relative: the same as a fraction of the largest.

    Raises:
        torch.linalg.LinAlgError: the eigensolver did not converge.
    """
    v = _right_vectors(tall)
    u = tall.new_empty((len(tall), v.shape[1]))
    for rows, images in zip(tall.split(_ROWS), u.split(_ROWS), strict=True):
        images.copy_(product(rows, v))
    s = _column_norms(u)
    kept = s > max(floor, relative * float(s.max()))
    if not bool(kept.all()):
        u, s, v = u[:, kept], s[kept], v[:, kept]
    u.div_(s.to(u.dtype))
    overlap = 0.0
    for _ in range(_ROUNDS):
        overlap = _straighten(u, s)
        if overlap <= _GOOD:
            break
    return Components(u, s, v, overlap)


def _right_vectors(tall: Tensor) -> Tensor:
    """(n, n) orthonormal; in no particular order."""
    n = tall.shape[1]
    if n <= _FEW:
        exact: Tensor = torch.linalg.eigh(gram(tall))[1]
        return exact.to(tall.dtype)
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(unit_gram(tall))
    small = int((values < _SMALL**2 * values[-1]).sum())
    if small > 1:
        basis = vectors[:, :small].contiguous()
        images = product(tall, basis).contiguous()
        if bool(images.any()):
            vectors[:, :small] = product(basis, _right_vectors(images))
    return vectors


def _column_norms(matrix: Tensor) -> Tensor:
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(_ROWS):
        total += rows.double().square_().sum(0)
    return total.sqrt_()


def _straighten(u: Tensor, s: Tensor) -> float:
    """Make nearly orthonormal columns more so, in place; returns how far they were.

    With ``U'U = I + E``, ``A = U diag(s) V'`` has the polar factor ``U (I - F) V'``, ``F_ij = E_ij s_i / (s_i + s_j)``,
    to first order.
    """
    excess = fast_gram(u)
    excess.diagonal().sub_(1)
    overlap = float(torch.linalg.vector_norm(excess, dim=0).max())
    values = s.to(u.dtype)
    for start in range(0, len(s), _ROWS):
        part = values[start : start + _ROWS, None]
        excess[start : start + _ROWS].mul_(part / (part + values))
    for rows in u.split(_ROWS):
        rows -= product(rows, excess)
    if overlap > _GOOD:
        u.div_(_column_norms(u).to(u.dtype))
    return overlap
