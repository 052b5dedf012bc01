"""Vectors as mixtures of few others: orthogonal matching pursuit, and nearest neighbours.

The others, the *atoms*, come in blocks and are never held all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Blocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]
"""Gives all atoms once, block by block, each with the number of its first: float32, shape (atoms, width)."""

Atoms = Callable[[torch.Tensor], torch.Tensor]
"""Gives atoms by their numbers, int64 of shape (n,)."""

_RIDGE = 1e-9
"""Share of the mean diagonal that keeps a Gram matrix of equal atoms invertible."""


def matching_pursuit(
    vectors: torch.Tensor, blocks: Blocks, atoms: Atoms, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit (Pati, Rezaiifar, Krishnaprasad 1993): atoms taken one by one, each the one most in
    line with what is left, and factors fitted anew by least squares after each.

    Args:
        vectors: float32, shape (n, width).
        count: atoms of each vector, at most as many as there are.

    Returns:
        numbers of atoms, int64, and factors, float32, both of shape (n, count).
    """
    chosen = torch.empty((len(vectors), 0), dtype=torch.int64)
    factors = torch.empty((len(vectors), 0))
    left = vectors
    for _ in range(count):
        chosen = torch.cat([chosen, _most_aligned(left, blocks, chosen)[:, None]], dim=1)
        picked = atoms(chosen.reshape(-1)).view(*chosen.shape, -1).double()
        gram = picked @ picked.mT
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-30)
        gram += _RIDGE * size * torch.eye(gram.shape[1], dtype=gram.dtype)
        factors = torch.linalg.solve(gram, picked @ vectors.double()[:, :, None])
        left = (vectors.double() - (factors * picked).sum(1)).float()
        factors = factors[:, :, 0].float()
    return chosen, factors


def nearest_neighbours(vectors: torch.Tensor, blocks: Blocks, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The atoms of the largest cosines, weighted by these; negative ones count as 0, and equally if all are.

    Returns:
        numbers of atoms, int64, and factors that add up to 1, float32, both of shape (n, count).
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    numbers = torch.empty((len(vectors), 0), dtype=torch.int64)
    cosines = torch.empty((len(vectors), 0))
    for start, block in blocks():
        found = unit @ torch.nn.functional.normalize(block, dim=1).T
        numbers = torch.cat([numbers, torch.arange(start, start + len(block)).expand(len(vectors), -1)], dim=1)
        cosines, order = torch.cat([cosines, found], dim=1).topk(min(count, cosines.shape[1] + len(block)), dim=1)
        numbers = numbers.gather(1, order)
    weights = cosines.clamp(min=0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
    return numbers, weights / weights.sum(1, keepdim=True)


def _most_aligned(left: torch.Tensor, blocks: Blocks, chosen: torch.Tensor) -> torch.Tensor:
    """For each vector the atom of the largest cosine, of either sign, that it has not yet."""
    best = torch.full((len(left),), -1.0)
    number = torch.zeros(len(left), dtype=torch.int64)
    for start, block in blocks():
        aligned = (left @ torch.nn.functional.normalize(block, dim=1).T).abs_()
        inside = (chosen >= start) & (chosen < start + len(block))
        rows, columns = inside.nonzero(as_tuple=True)
        aligned[rows, chosen[rows, columns] - start] = -1.0
        value, place = aligned.max(1)
        number = torch.where(value > best, place + start, number)
        best = torch.maximum(best, value)
    return number
