"""Leading singular subspaces by matrix products alone: block Krylov and randomised power iteration.

Both grow an orthonormal basis Q of the short side and keep its image W = A Q, so that the Rayleigh-Ritz step costs
one small eigenproblem, W'W = P diag(s^2) P', and no further product with A: the right singular vectors are Q P, the
left ones W P / s, and A (Q P) = (W P) holds exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_px.kernels.orthonormal import gram, orthonormal_columns
from mergekit_px.kernels.product import product
from mergekit_px.kernels.spectra import noise_onset

_SAFETY = 0.75
"""Extrapolated errors must be this small a part of what is asked."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """An orthonormal basis (n, d) of right directions, its images W = A Q (m, d) and their float64 Gram matrix."""

    basis: Tensor
    images: Tensor
    gram: Tensor
    converged: bool


@dataclass(slots=True)
class _Convergence:
    """Follows the leading Ritz values, which grow towards the singular values, and extrapolates what is missing.

    The missing part of a geometrically converging sequence is ``step * ratio / (1 - ratio)``. It is asked of the
    captured energy, and of each value that stands above the noise edge; components inside a flat tail have no
    identity of their own, so nothing but their energy is asked.
    """

    rank: int
    shape: tuple[int, int]
    energy: float
    tolerance: float
    values: Tensor | None = None
    steps: list[tuple[float, float]] = field(default_factory=list)

    def reached(self, values: Tensor) -> bool:
        """``values`` (k,) float64 on the CPU, descending, scaled as ``energy`` is."""
        before, self.values = self.values, values
        captured = float(values.square().sum())
        if self.energy - captured <= 1e-12 * self.energy:
            return True
        if before is None or len(values) < self.rank:
            return False
        count = max(1, noise_onset(values, self.energy, self.shape))
        known = before[: len(values)].new_zeros(len(values)).index_copy(0, torch.arange(len(before)), before)
        growth = float(((values - known) / values.clamp_min(1e-300))[:count].max())
        self.steps.append((captured - float(known.square().sum()), growth))
        if len(self.steps) < 2:
            return False
        missing = [_extrapolate(*pair) for pair in zip(self.steps[-2], self.steps[-1], strict=True)]
        allowed = _SAFETY * self.tolerance
        return missing[0] <= allowed * captured and missing[1] <= allowed


def _extrapolate(before: float, step: float) -> float:
    if step <= 0:
        return 0.0
    ratio = min(step / before, 0.95) if before > 0 else 0.95
    return step * ratio / (1 - ratio)


class _Growing:
    """Q, W = A Q / scale in float64 and W'W, extended block by block."""

    def __init__(self, matrix: Tensor, scale: float) -> None:
        self.matrix = matrix
        self.scale = scale
        self.basis = matrix.new_empty((matrix.shape[1], 0))
        self.images: list[Tensor] = []
        self.gram = matrix.new_empty((0, 0), dtype=torch.float64)

    def append(self, block: Tensor) -> Tensor:
        """Takes an (n, b) block orthonormal to the basis; returns its image A block / scale."""
        image = product(self.matrix, block / self.scale)
        exact = image.double()
        known, width = len(self.gram), exact.shape[1]
        extended = self.gram.new_zeros((known + width, known + width))
        extended[:known, :known] = self.gram
        extended[known:, known:] = exact.T @ exact
        if self.images:
            # A'A maps a block into the span of itself and its neighbours, so all other products vanish.
            before = self.images[-1]
            cross = exact.T @ before
            extended[known:, known - before.shape[1] : known] = cross
            extended[known - before.shape[1] : known, known:] = cross.T
        self.gram = extended
        self.images.append(exact)
        self.basis = torch.cat([self.basis, block], dim=1)
        return image

    def back(self, image: Tensor) -> Tensor:
        return product(self.matrix.T, image / self.scale)

    def values(self, rank: int) -> Tensor:
        squares: Tensor = torch.linalg.eigvalsh(self.gram).flip(0)[:rank]
        return squares.clamp_min(0.0).sqrt().cpu()

    def finish(self, converged: bool) -> Subspace:
        images = torch.cat(self.images, dim=1) if self.images else self.basis.new_empty((self.matrix.shape[0], 0))
        # Products that vanish do so up to rounding, which matters beside small singular values: once, all of them.
        return Subspace(self.basis, images.mul_(self.scale), gram(images), converged)


def block_krylov(
    matrix: Tensor, rank: int, energy: float, generator: torch.Generator, tolerance: float, limit: int
) -> Subspace:
    """Block Krylov space of A'A, grown until ``rank`` values have converged or ``limit`` columns are reached.

    Musco and Musco, arXiv:1504.05477, with full reorthogonalisation and an adaptive depth.

    Args:
        matrix: (m, n) with m >= n.
        rank: leading components wanted.
        energy: squared Frobenius norm of the matrix, positive.
        generator: CPU generator of the random start block.
        tolerance: relative error allowed in the captured energy and in each identifiable singular value.
        limit: most columns of the basis.
    """
    scale = math.sqrt(energy)
    width = min(limit, max(16, 16 * -(-rank // 48)))
    watch = _Convergence(rank, (matrix.shape[0], matrix.shape[1]), 1.0, tolerance)
    space = _Growing(matrix, scale)
    block = product(matrix.T, _sketch(matrix.shape[0], width, generator, matrix) / scale)
    while True:
        block = _new_directions(block, space.basis)
        size = space.basis.shape[1] + block.shape[1]
        if block.shape[1] == 0 or size > limit:
            return space.finish(converged=block.shape[1] == 0)
        image = space.append(block)
        if size >= rank and watch.reached(space.values(rank)):
            return space.finish(converged=True)
        block = space.back(image)


def power_iteration(
    matrix: Tensor, rank: int, energy: float, generator: torch.Generator, tolerance: float, limit: int
) -> Subspace:
    """Randomised range of A' refined by power iteration; a sketch that does not converge is doubled.

    Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4. Arguments as in :func:`block_krylov`.
    """
    scale = math.sqrt(energy)
    shape = (matrix.shape[0], matrix.shape[1])
    columns = min(limit, max(2 * rank, rank + 16))
    block = product(matrix.T, _sketch(shape[0], columns, generator, matrix) / scale)
    while True:
        watch = _Convergence(rank, shape, 1.0, tolerance)
        for _ in range(8):
            basis = orthonormal_columns(block, _floor(block))
            exhausted = basis.shape[1] < block.shape[1]
            space = _Growing(matrix, scale)
            image = space.append(basis)
            if watch.reached(space.values(rank)) or exhausted:
                return space.finish(converged=True)
            block = space.back(image)
        if columns >= limit:
            return space.finish(converged=limit >= shape[1])
        fresh = min(limit, 2 * columns) - columns
        columns += fresh
        block = torch.cat([block, product(matrix.T, _sketch(shape[0], fresh, generator, matrix) / scale)], dim=1)


def _sketch(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    # Drawn on the CPU, so that the numbers do not depend on the device.
    return torch.randn((rows, columns), generator=generator).to(like.device, like.dtype)


def _new_directions(block: Tensor, basis: Tensor) -> Tensor:
    # Twice is enough: the first time amplifies what little is left of a nearly dependent direction.
    for floor, passes in ((_floor(block), 1), (0.1, 2)):
        block = block - product(basis, product(basis.T, block))
        block = orthonormal_columns(block, floor, passes)
    return block


def _floor(block: Tensor) -> float:
    return 10 * torch.finfo(block.dtype).eps * float(torch.linalg.vector_norm(block))
