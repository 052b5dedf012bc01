"""Singular value decompositions, truncated and thin, with a report of how good they are.

==============  ==============================================================================================
``dense``       LAPACK or cuSOLVER on the tall orientation; exact
``gram``        eigenvectors of the float64 Gram matrix of the short side; exact for float32 input
``krylov``      block Krylov space of adaptive depth; for few leading components of a large matrix
``randomised``  power iteration on a random sketch, doubled until converged
``auto``        ``krylov`` up to an eighth of the rank of a large matrix, else the cheaper exact route
==============  ==============================================================================================

The same input gives the same bytes on every run of one machine and thread count: sketches are drawn from a
generator seeded with (seed, label, shape), and the largest entry of each left vector is positive.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_px.errors import NonFiniteError, RunError, UsageError
from mergekit_px.kernels.orthonormal import gram, sharpen, squared_norm, unit_gram
from mergekit_px.kernels.product import product
from mergekit_px.kernels.spectra import noise_onset, null_floor
from mergekit_px.kernels.subspace import block_krylov, power_iteration

SVDMode = Literal["auto", "dense", "randomised", "krylov", "gram"]

LARGE = 384
"""Matrices whose short side is below this are decomposed densely and in float64: nothing is faster."""


@dataclass(frozen=True, slots=True)
class SVD:
    """``u @ diag(s) @ v.T`` with what is known about its quality.

    Fewer components than asked are returned where the matrix has a smaller numerical rank: components that are
    rounding error of the decomposition are left out, so a zero matrix has none.
    """

    u: Tensor
    """(m, k) orthonormal left singular vectors, in the input's dtype."""
    s: Tensor
    """(k,) singular values, descending, positive."""
    v: Tensor
    """(n, k) orthonormal right singular vectors."""
    energy: float
    """Squared Frobenius norm of the whole matrix."""
    captured_energy: float
    """Share of ``energy`` in ``s``; 1 for a zero matrix."""
    residual: float
    """Largest ``|| A' u - s v || / s_1`` over 16 of the components (``|| A v - s u ||`` for wide matrices)."""
    mode: str
    """The route that served."""
    converged: bool = True
    """Whether the iterative route reached its tolerance; where it did not, an exact route served instead."""
    identifiable: int = 0
    """How many leading components stand above noise of the energy that they leave over."""
    fallbacks: tuple[str, ...] = ()
    """Drivers that failed, and what served instead."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a report should know, fallbacks and all."""
        notes = list(self.fallbacks)
        if not self.converged:
            notes.append(f"the iteration did not converge; decomposed exactly ({self.mode})")
        if self.identifiable < self.rank:
            notes.append(
                f"components {self.identifiable + 1} to {self.rank} are not identifiable: flat tail, "
                "no larger than noise of the remaining energy would make them"
            )
        return tuple(notes)

    @property
    def rank(self) -> int:
        return len(self.s)

    def matrix(self) -> Tensor:
        """(m, n) product of the factors."""
        return product(self.u * self.s, self.v.T)

    def leading(self, count: int) -> SVD:
        """The first ``count`` components."""
        s = self.s[:count]
        captured = float(s.double().square().sum()) / self.energy if self.energy > 0 else 1.0
        return SVD(
            self.u[:, :count], s, self.v[:, :count], self.energy, captured, self.residual, self.mode, self.converged,
            min(self.identifiable, len(s)), self.fallbacks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Factors:
    u: Tensor
    s: Tensor
    v: Tensor
    mode: str
    converged: bool = True
    fallbacks: tuple[str, ...] = ()


def truncated_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    mode: SVDMode = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    label: str = "",
) -> SVD:
    """The leading components of a matrix.

    Args:
        matrix: (m, n), any floating dtype; narrower ones are computed in float32.
        rank: components wanted, 0 or more; all of them if left out or above min(m, n).
        mode: route, see the module.
        tolerance: for the iterative routes, the relative error allowed in the captured energy and in each
            singular value above the noise edge.
        seed: seed of the sketches.
        label: name of the tensor; part of the seed, and of error messages.

    Raises:
        NonFiniteError: the matrix holds a NaN or an infinity.
        UsageError: a negative rank, or something that is not a matrix.
        RunError: every driver failed.
    """
    if matrix.ndim != 2:
        raise UsageError(f"a singular value decomposition needs a matrix, got shape {tuple(matrix.shape)}", where=label)
    if rank is not None and rank < 0:
        raise UsageError(f"the number of components must not be negative, got {rank}", where=label or None)
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    short = min(matrix.shape)
    rank = short if rank is None else min(rank, short)
    energy = squared_norm(matrix)
    if energy != energy or energy == float("inf"):
        raise NonFiniteError(
            "the matrix holds a NaN or an infinity",
            where=label or None,
            hint="check the sources with `pxmerge inspect`",
        )
    if rank == 0 or energy == 0:
        return SVD(
            matrix.new_zeros((matrix.shape[0], 0)), matrix.new_zeros(0), matrix.new_zeros((matrix.shape[1], 0)),
            energy, 1.0 if energy == 0 else 0.0, 0.0, "dense",
        )  # fmt: skip
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    found = _decompose(tall.double() if short < LARGE else tall, rank, energy, mode, tolerance, seed, label)
    kept = int((found.s > null_floor(matrix.dtype) * found.s[0]).sum())
    left, right = (found.v, found.u) if wide else (found.u, found.v)
    u, v = orient(left[:, :kept].to(matrix.dtype), right[:, :kept].to(matrix.dtype))
    return _assess(matrix, energy, u, found.s[:kept].to(matrix.dtype), v, found)


def _decompose(
    tall: Tensor, rank: int, energy: float, mode: SVDMode, tolerance: float, seed: int, label: str
) -> _Factors:
    n = tall.shape[1]
    if mode == "auto" and n >= LARGE and rank * (5 if n >= 3072 else 8) <= n:
        mode = "krylov"
    if mode == "dense":
        return _dense_svd(tall, rank, label)
    if mode == "gram":
        return _gram_svd(tall, rank)
    if mode == "auto":
        return _exact_svd(tall, rank, label)
    iterate = block_krylov if mode == "krylov" else power_iteration
    # Past half the short side, an exact decomposition is cheaper than a larger basis.
    limit = n if n <= 64 else min(n, max(n // 2, 2 * rank))
    space = iterate(tall, rank, energy, _generator(seed, label, tall), tolerance, limit)
    if space.converged:
        return _rayleigh_ritz(space.basis, space.images, space.gram, rank, mode)
    del space
    exact = _exact_svd(tall, rank, label)
    return _Factors(exact.u, exact.s, exact.v, exact.mode, False, exact.fallbacks)


def _exact_svd(tall: Tensor, rank: int, label: str) -> _Factors:
    """The cheapest exact route: the Gram matrix where it saves work and loses nothing, else LAPACK."""
    m, n = tall.shape
    if n < LARGE or tall.dtype != torch.float32:
        return _dense_svd(tall, rank, label)
    if tall.is_cuda or 2 * m >= 3 * n:
        return _gram_svd(tall, rank)
    leading = _gram_leading(tall, rank) if 2 * rank <= n else None
    return leading or _dense_svd(tall, rank, label)


def _generator(seed: int, label: str, matrix: Tensor) -> torch.Generator:
    key = f"{seed}|{label}|{sorted(matrix.shape)}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(number)


def _rayleigh_ritz(basis: Tensor, images: Tensor, images_gram: Tensor, rank: int, mode: str) -> _Factors:
    """Components of A within an orthonormal (n, d) basis, from its (m, d) images under A."""
    squares, weights = _leading_eigenpairs(images_gram, rank)
    values = squares.clamp_min(0.0).sqrt()
    kept = values > null_floor(basis.dtype) * values[0]
    values, weights = values[kept], weights[:, kept]
    u = product(images, (weights / values).to(images.dtype)).to(basis.dtype)
    v = product(basis, weights.to(basis.dtype))
    return _Factors(sharpen(u), values.to(basis.dtype), sharpen(v), mode)


def _leading_eigenpairs(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their vectors."""
    values, vectors = torch.linalg.eigh(symmetric)
    count = min(count, len(values))
    return values[len(values) - count :].flip(0), vectors[:, len(values) - count :].flip(1)


def _gram_leading(tall: Tensor, rank: int) -> _Factors | None:
    """Float32 eigenvectors of the Gram matrix, with the values restored by a Rayleigh-Ritz step in float64.

    They span the leading subspace well enough where the wanted singular values are not small; None where they are.
    """
    values, basis = _leading_eigenpairs(unit_gram(tall), rank + max(16, rank // 8))
    if float(values[rank - 1]) < 5e-4 * float(values[0]):
        return None
    images = product(tall, basis)
    return _rayleigh_ritz(basis, images, gram(images), rank, "gram")


def _gram_svd(tall: Tensor, rank: int) -> _Factors:
    if tall.dtype == torch.float32 and 2 * rank <= tall.shape[1]:
        leading = _gram_leading(tall, rank)
        if leading is not None:
            return leading
    squares, vectors = _leading_eigenpairs(gram(tall), rank)
    values = squares.clamp_min(0.0).sqrt()
    # Squaring leaves singular values below 1e-8 of the largest to chance.
    kept = values > max(null_floor(tall.dtype), 1e-7) * values[0]
    values, vectors = values[kept], vectors[:, kept]
    u = product(tall, (vectors / values).to(tall.dtype))
    return _Factors(u, values.to(tall.dtype), vectors.to(tall.dtype), "gram")


def _dense_svd(tall: Tensor, rank: int, label: str) -> _Factors:
    failures: list[str] = []
    attempts: list[tuple[str, str | None, torch.dtype, str]] = [("default driver", None, tall.dtype, str(tall.device))]
    if tall.is_cuda:
        attempts.append(("gesvd", "gesvd", tall.dtype, str(tall.device)))
    attempts.append(("float64 on the CPU", None, torch.float64, "cpu"))
    for name, driver, dtype, device in attempts:
        try:
            u, s, vh = torch.linalg.svd(tall.to(device, dtype), full_matrices=False, driver=driver)
        except RuntimeError as error:  # no convergence, or a cuSOLVER status
            failures.append(f"SVD ({name}) failed: {str(error).splitlines()[0]}")
            continue
        if not bool(torch.isfinite(s).all()) or not bool(torch.isfinite(u).all()):
            failures.append(f"SVD ({name}) returned NaN")
            continue
        if failures:
            failures.append(f"served by {name}")
        if rank < tall.shape[1]:
            u, s, vh = u[:, :rank].clone(), s[:rank], vh[:rank].clone()
        u, s, vh = (part.to(tall.device, tall.dtype) for part in (u, s, vh))
        return _Factors(u, s, vh.T, "dense", fallbacks=tuple(failures))
    try:
        served = _gram_svd(tall.double(), rank)
    except RuntimeError as error:
        raise RunError("no driver could decompose the matrix", where=label or None) from error
    u, s, v = (part.to(tall.dtype) for part in (served.u, served.s, served.v))
    return _Factors(u, s, v, "gram", fallbacks=(*failures, "served by the Gram matrix"))


def orient(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each left vector positive: singular vectors are only defined up to a sign.

    Changes its arguments in place.
    """
    if u.numel() == 0:
        return u, v
    low, high = u.aminmax(dim=0)
    sign = torch.where(-low > high, -1.0, 1.0).to(u.dtype)
    return u.mul_(sign), v.mul_(sign)


def _assess(matrix: Tensor, energy: float, u: Tensor, s: Tensor, v: Tensor, found: _Factors) -> SVD:
    probe = sorted({round(i * (len(s) - 1) / 15) for i in range(16)})
    # Images of the short side's vectors are exact by construction; those of the long side's tell the quality.
    if matrix.shape[0] < matrix.shape[1]:
        gap = matrix @ v[:, probe] - u[:, probe] * s[probe]
    else:
        gap = matrix.T @ u[:, probe] - v[:, probe] * s[probe]
    residual = float(torch.linalg.vector_norm(gap, dim=0).max() / s[0])
    captured = min(1.0, float(s.double().square().sum()) / energy)
    identifiable = noise_onset(s, energy, (matrix.shape[0], matrix.shape[1]))
    # An exactly captured matrix leaves nothing that could be noise.
    if captured > 1 - 1e-6:
        identifiable = len(s)
    return SVD(u, s, v, energy, captured, residual, found.mode, found.converged, identifiable, found.fallbacks)
