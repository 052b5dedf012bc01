"""Orthonormal bases from Gram matrices in float64: two GEMMs and a small eigenproblem instead of a Householder QR."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_px.kernels.product import fast_gram, product

_BLOCK_ELEMENTS = 1 << 18
"""Elements converted to float64 at a time: 2 MiB, which stays in the cache."""


def squared_norm(matrix: Tensor) -> float:
    """Squared Frobenius norm of a matrix, summed in float64; infinite or NaN where an element is."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    total = 0.0
    for block in matrix.split(rows):
        total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    return total


def inner_product(left: Tensor, right: Tensor) -> float:
    """Sum of the products of the elements of two matrices of one shape, in float64."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, left.shape[1]))
    return sum(
        float(torch.dot(mine.double().flatten(), theirs.double().flatten()))
        for mine, theirs in zip(left.split(rows), right.split(rows), strict=True)
    )


def gram(matrix: Tensor) -> Tensor:
    """``matrix.T @ matrix`` of an (m, n) matrix as an (n, n) float64 tensor.

    Only the lower block triangle is multiplied out; the rows are converted to float64 block by block.
    """
    n = matrix.shape[1]
    total = matrix.new_zeros((n, n), dtype=torch.float64)
    step = max(64, -(-n // 8))
    bounds = [(start, min(start + step, n)) for start in range(0, n, step)]
    for block in matrix.split(max(256, _BLOCK_ELEMENTS // max(1, n))):
        exact = block.double()
        for start, stop in bounds:
            total[start:stop, :stop].addmm_(exact[:, start:stop].T, exact[:, :stop])
    for start, stop in bounds:
        total[:start, start:stop] = total[start:stop, :start].T
    return total


def unit_gram(matrix: Tensor) -> Tensor:
    """``matrix.T @ matrix`` of a matrix that is not zero, in its own dtype, scaled to trace 1."""
    return fast_gram(matrix, 1 / math.sqrt(squared_norm(matrix)))


def orthonormal_columns(block: Tensor, floor: float = 0.0, passes: int = 2) -> Tensor:
    """An orthonormal basis of the columns of an (m, b) block, directions of norm up to ``floor`` left out.

    Each pass applies the inverse square root of the float64 Gram matrix; the second removes what the squared
    condition number of the first has left. Returns an (m, b') tensor with b' <= b.
    """
    for _ in range(passes):
        values, vectors = torch.linalg.eigh(gram(block))
        kept = values > max(floor**2, 1e-14 * float(values[-1])) if len(values) else values > 0
        block = product(block, (vectors[:, kept] * values[kept].rsqrt()).to(block.dtype))
        floor = 0.5
    return block


def sharpen(basis: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthonormal basis of a nearly orthonormal (m, k) basis."""
    return 1.5 * basis - 0.5 * product(basis, product(basis.T, basis))
