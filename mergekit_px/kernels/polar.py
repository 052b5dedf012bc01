"""The polar factor ``P Q'`` of a matrix ``P diag(d) Q'``: the nearest matrix with orthonormal columns (or rows).

=================  ==========================================================================================
``svd``            from a dense decomposition; exact
``gram``           from float32 eigenvectors of the Gram matrix, straightened, as exact as ``svd`` in float32;
                   ``svd`` where the matrix is so ill-conditioned that this does not converge
``gram64``         ``X (X'X)^(-1/2)`` with the Gram matrix and its eigenvectors in float64; exact for float32
``newton_schulz``  matrix products only, for accelerators; falls back to ``gram64`` where it does not converge
``auto``           ``newton_schulz`` on CUDA without a floor, else ``gram`` for float32 and ``svd`` for float64
=================  ==========================================================================================

Directions whose singular value does not exceed a floor are left out (a pseudo-inverse root), so that the factor of
a rank-deficient stack, such as that of duplicate sources, is a partial isometry and not an amplified rounding error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_px.errors import NonFiniteError, UsageError
from mergekit_px.kernels.gram_components import gram_components
from mergekit_px.kernels.orthonormal import gram, squared_norm
from mergekit_px.kernels.product import product
from mergekit_px.kernels.spectra import null_floor
from mergekit_px.kernels.svd import LARGE, truncated_svd

PolarMode = Literal["auto", "svd", "gram", "gram64", "newton_schulz"]

STACK_FLOOR = 1e-4
"""Relative floor for stacks of orthonormal bases: below it, two sources share a direction up to rounding."""

_ROWS = 1024

_MOST_STEPS = 40
_ORTHOGONAL = 1e-5
"""Newton-Schulz has converged when ||Y'Y - I||_F is at most this times sqrt(rank)."""


@dataclass(frozen=True, slots=True)
class PolarFactor:
    """A polar factor with its report."""

    factor: Tensor
    """(m, n) partial isometry of rank ``rank``, in the input's dtype."""
    rank: int
    """Number of directions above the floor."""
    nuclear_norm: float
    """Sum of their singular values."""
    mode: str
    """The route that served."""
    steps: int
    """Newton-Schulz steps taken; 0 for the exact routes."""
    error: float
    """Distance from a partial isometry, ``||Y Y'Y - Y||_F / ||Y||_F`` on a few probes."""
    values: Tensor | None = None
    """Singular values above the floor, in no particular order; None where the route does not give them."""
    notes: tuple[str, ...] = ()

    @property
    def mean_value(self) -> float:
        """Mean of the singular values above the floor; 0 for a zero matrix."""
        return self.nuclear_norm / self.rank if self.rank else 0.0


@dataclass(frozen=True, slots=True)
class _Found:
    factor: Tensor
    rank: int
    nuclear_norm: float
    mode: str
    steps: int = 0
    values: Tensor | None = None
    notes: tuple[str, ...] = ()


def polar_factor(
    matrix: Tensor,
    *,
    mode: PolarMode = "auto",
    floor: float = 0.0,
    relative_floor: float | None = None,
    overwrite: bool = False,
    label: str = "",
) -> PolarFactor:
    """The polar factor of an (m, n) matrix, float32 or float64 (narrower dtypes are computed in float32).

    Args:
        matrix: (m, n); wide matrices are transposed on the way.
        mode: route, see the module.
        floor: singular values up to this are left out.
        relative_floor: the same as a fraction of the largest; the rounding error of the dtype if left out.
        overwrite: the factor takes the matrix's place in memory, unless no direction is above the floor.
        label: name of the tensor, for error messages.

    Raises:
        NonFiniteError: the matrix holds a NaN or an infinity.
        UsageError: not a matrix.
        RunError: every driver failed.
    """
    if matrix.ndim != 2:
        raise UsageError(f"a polar factor needs a matrix, got shape {tuple(matrix.shape)}", where=label or None)
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    energy = squared_norm(matrix)
    if not math.isfinite(energy):
        raise NonFiniteError("the matrix holds a NaN or an infinity", where=label or None)
    if energy == 0:
        return PolarFactor(torch.zeros_like(matrix), 0, 0.0, "svd", 0, 0.0)
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    relative = null_floor(matrix.dtype) if relative_floor is None else relative_floor
    if floor <= relative * math.sqrt(energy / tall.shape[1]):
        floor = 0.0  # the largest singular value is at least the root mean square, so the relative floor is higher
    if tall.shape[1] < LARGE:
        tall = tall.double()
    found = _find(tall, energy, _route(tall, mode, floor), floor, relative, label)
    distance = _distance(found.factor)
    factor = found.factor.T if wide else found.factor
    factor = matrix.copy_(factor) if overwrite and found.rank else factor.to(matrix.dtype).contiguous()
    return PolarFactor(
        factor, found.rank, found.nuclear_norm, found.mode, found.steps, distance, found.values, found.notes
    )


def _route(tall: Tensor, mode: PolarMode, floor: float) -> str:
    if mode != "auto":
        return mode
    if tall.is_cuda and floor == 0:
        return "newton_schulz"
    return "gram" if tall.dtype == torch.float32 else "svd"


def _find(tall: Tensor, energy: float, route: str, floor: float, relative: float, label: str) -> _Found:
    if route == "svd":
        return _by_svd(tall, floor, relative, label)
    try:
        if route == "gram":
            return _by_components(tall, floor, relative, label)
        if route == "gram64":
            return _by_gram(tall, floor, relative)
        return _by_products(tall, energy, floor, relative)
    except RuntimeError:  # no convergence, or a cuSOLVER status
        found = _by_svd(tall, floor, relative, label)
        notes = (f"polar factor ({route}) failed, served by svd", *found.notes)
        return _Found(found.factor, found.rank, found.nuclear_norm, found.mode, 0, found.values, notes)


def _by_svd(tall: Tensor, floor: float, relative: float, label: str) -> _Found:
    parts = truncated_svd(tall, mode="dense", label=label)
    rank = int((parts.s > max(floor, relative * float(parts.s[0]))).sum())
    u, v = parts.u[:, :rank], parts.v[:, :rank]
    return _Found(u @ v.T, rank, float(parts.s[:rank].double().sum()), "svd", 0, parts.s[:rank], parts.fallbacks)


def _by_components(tall: Tensor, floor: float, relative: float, label: str) -> _Found:
    parts = gram_components(tall, floor, relative)
    if not parts.converged:
        del parts
        return _by_svd(tall, floor, relative, label)
    values = parts.s.sort(descending=True).values
    if parts.v.shape[0] != parts.v.shape[1]:
        return _Found(product(parts.u, parts.v.T), len(values), float(values.sum()), "gram", 0, values)
    for rows in parts.u.split(_ROWS):  # in place, as one more matrix would be the largest share of the memory
        rows.copy_(product(rows, parts.v.T))
    return _Found(parts.u, len(values), float(values.sum()), "gram", 0, values)


def _by_gram(tall: Tensor, floor: float, relative: float) -> _Found:
    squares, vectors = torch.linalg.eigh(gram(tall))
    values = squares.clamp_min(0.0).sqrt()
    # Squaring leaves singular values below 1e-8 of the largest to chance.
    kept = values > max(floor, max(relative, 1e-7) * float(values[-1]))
    values, vectors = values[kept], vectors[:, kept]
    root = (vectors / values) @ vectors.T
    return _Found(tall @ root.to(tall.dtype), len(values), float(values.sum()), "gram64", 0, values)


def _by_products(tall: Tensor, energy: float, floor: float, relative: float) -> _Found:
    """Newton-Schulz with the scaling that is optimal for singular values in [low, 1].

    ``Y <- Y (1.5 a I - 0.5 a^3 Y'Y)`` with ``a^2 = 3 / (1 + low + low^2)`` (Chen and Chow, ANL/MCS-P5059-0114).
    Values below the first ``low`` are no danger, they take more steps.
    """
    n = tall.shape[1]
    current = tall / min(math.sqrt(energy), _norm_bound(tall))
    low = 1e-3
    for step in range(1, _MOST_STEPS + 1):
        square = current.T @ current
        gap = float(torch.linalg.vector_norm(square - torch.eye(n, dtype=square.dtype, device=square.device)))
        if gap <= _ORTHOGONAL * math.sqrt(n):
            nuclear = float((current.double() * tall.double()).sum())
            return _Found(current, n, nuclear, "newton_schulz", step - 1)
        scale = math.sqrt(3 / (1 + low + low * low)) if low < 0.99 else 1.0
        current = 1.5 * scale * current - 0.5 * scale**3 * (current @ square)
        low = min(1.0, 0.5 * scale * low * (3 - scale**2 * low**2))
    found = _by_gram(tall, floor, relative)
    note = f"Newton-Schulz did not converge in {_MOST_STEPS} steps (rank {found.rank} of {n}); served by gram64"
    return _Found(found.factor, found.rank, found.nuclear_norm, found.mode, _MOST_STEPS, found.values, (note,))


def _norm_bound(matrix: Tensor) -> float:
    """sqrt(||X||_1 ||X||_inf), an upper bound of the spectral norm."""
    magnitude = matrix.abs()
    return math.sqrt(float(magnitude.sum(0).max()) * float(magnitude.sum(1).max()))


def _distance(factor: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((factor.shape[1], 16), generator=generator).to(factor.device, factor.dtype)
    image = factor @ probe
    size = float(torch.linalg.vector_norm(image))
    return float(torch.linalg.vector_norm(factor @ (factor.T @ image) - image)) / size if size > 0 else 0.0


def procrustes_rotation(start: Tensor, end: Tensor, ridge: float, label: str) -> Tensor:
    """The orthogonal (n, n) matrix R with ``start @ R`` nearest to ``end``, both (m, n), in float64.

    ``ridge``, in shares of the mean square norm of start's columns, draws R towards doing nothing, which also decides
    what it does along directions that start does not have.
    """
    cross = start.double().T @ end.double()
    size = float(start.double().square().sum()) / start.shape[1]
    cross.diagonal().add_(ridge * size if size else 1.0)
    return polar_factor(cross, relative_floor=0.0, label=label).factor


def skew_of(rotation: Tensor) -> Tensor:
    """``A = (R + I)^-1 (R - I)``, made exactly skew; R has no eigenvalue of -1."""
    one = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    skew: Tensor = torch.linalg.solve(rotation + one, rotation - one)
    return (skew - skew.T) / 2


def rotation_of(skew: Tensor) -> Tensor:
    """``R = (I - A)^-1 (I + A)``."""
    one = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(one - skew, one + skew)
    return rotation
