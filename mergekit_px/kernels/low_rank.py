"""Matrices kept as products of thin factors: exact algebra without ever forming the product.

An adapter's update ``B A`` of rank r costs (m + n) r numbers; sums are concatenations, norms and inner products are
traces of r x r matrices, and a singular value decomposition is two thin QR factorisations and one of an r x r core.
The factors keep their dtype; the cores are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.errors import NonFiniteError, TensorMismatchError
from mergekit_px.kernels.orthonormal import squared_norm
from mergekit_px.kernels.product import product
from mergekit_px.kernels.svd import SVD, orient, truncated_svd

_NULL = 1e-10
"""Relative singular values of a float64 core below this are rounding errors of its QR factorisations."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left @ right.T``, an (m, n) matrix from (m, r) and (n, r) factors."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise TensorMismatchError(
                f"factors of shapes {tuple(self.left.shape)} and {tuple(self.right.shape)} do not fit one another"
            )

    @classmethod
    def from_adapter(cls, b: Tensor, a: Tensor, scale: float = 1.0) -> LowRank:
        """``scale * b @ a`` from a LoRA's (m, r) and (r, n) matrices."""
        return cls(b * scale, a.T)

    @classmethod
    def from_svd(cls, parts: SVD) -> LowRank:
        return cls(parts.u * parts.s, parts.v)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns of the factors, an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        return product(self.left, self.right.T)

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        return concatenate([self, other])

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product, in float64."""
        _check_shapes([self, other])
        left = self.left.double().T @ other.left.double()
        right = self.right.double().T @ other.right.double()
        return float((left * right).sum())

    def norm(self) -> float:
        """Frobenius norm, from the triangular factors: no cancellation for nearly dependent terms."""
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def svd(self, rank: int | None = None) -> SVD:
        """The ``rank`` leading components (all if left out), exact; null components are left out.

        Raises:
            NonFiniteError: a factor holds a NaN or an infinity.
        """
        for factor in (self.left, self.right):
            if not math.isfinite(squared_norm(factor)):
                raise NonFiniteError("a factor holds a NaN or an infinity")
        (basis_left, basis_right), core = self._core()
        inner = truncated_svd(core, rank, mode="dense")
        kept = inner.s > _NULL * inner.s[:1] if inner.rank else inner.s > 0
        u, v = orient(basis_left @ inner.u[:, kept], basis_right @ inner.v[:, kept])
        dtype = self.left.dtype
        return SVD(
            u.to(dtype), inner.s[kept].to(dtype), v.to(dtype), inner.energy, inner.captured_energy, inner.residual,
            "factored", identifiable=int(kept.sum()), fallbacks=inner.fallbacks,
        )  # fmt: skip

    def _core(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        left, left_triangle = torch.linalg.qr(self.left.double())
        right, right_triangle = torch.linalg.qr(self.right.double())
        return (left, right), left_triangle @ right_triangle.T


def concatenate(terms: Sequence[LowRank]) -> LowRank:
    """The sum of factored matrices, its rank the sum of theirs.

    Raises:
        TensorMismatchError: different shapes.
    """
    _check_shapes(terms)
    return LowRank(torch.cat([t.left for t in terms], dim=1), torch.cat([t.right for t in terms], dim=1))


@dataclass(frozen=True, slots=True)
class SharedCores:
    """Factored matrices in one pair of orthonormal bases: ``left @ cores[t] @ right.T`` is matrix t, exactly.

    Whatever maps deltas to a delta without looking at coordinates (sums, TSV-M, Iso-C, every method built on
    singular vectors) may run on the small cores and be mapped back (core space, arXiv:2509.17786).
    """

    left: Tensor
    """(m, p) orthonormal, p at most the sum of the ranks."""
    right: Tensor
    """(n, q) orthonormal."""
    cores: tuple[Tensor, ...]
    """(p, q) each."""

    def expand(self, core: Tensor) -> LowRank:
        """The (m, n) matrix that a (p, q) core stands for."""
        dtype = self.left.dtype
        return LowRank(self.left @ core.to(dtype), self.right)


def shared_cores(terms: Sequence[LowRank]) -> SharedCores:
    """Common bases of factored matrices and their cores, in float64 inside and the factors' dtype outside.

    Raises:
        TensorMismatchError: different shapes.
    """
    total = concatenate(terms)
    dtype = total.left.dtype
    left, left_triangle = torch.linalg.qr(total.left.double())
    right, right_triangle = torch.linalg.qr(total.right.double())
    ranks = [term.rank for term in terms]
    pairs = zip(left_triangle.split(ranks, dim=1), right_triangle.split(ranks, dim=1), strict=True)
    return SharedCores(left.to(dtype), right.to(dtype), tuple((a @ b.T).to(dtype) for a, b in pairs))


def cosine(first: LowRank, second: LowRank) -> float:
    """Cosine of the angle between two factored matrices; 0 where one of them is zero."""
    size = math.sqrt(max(first.inner(first), 0.0) * max(second.inner(second), 0.0))
    return first.inner(second) / size if size > 0 else 0.0


def _check_shapes(terms: Sequence[LowRank]) -> None:
    shapes = {term.shape for term in terms}
    if len(shapes) != 1:
        raise TensorMismatchError(f"factored matrices of different shapes: {sorted(shapes)}")
