"""Mixtures of few rows, against dense computations."""

from __future__ import annotations

import numpy as np
import torch

from mergekit_px.kernels.pursuit import matching_pursuit, nearest_neighbours


def by_hand(vector: np.ndarray, atoms: np.ndarray, count: int) -> dict[int, float]:
    """Orthogonal matching pursuit of one vector, with all atoms at hand."""
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen: list[int] = []
    left, factors = vector, np.empty(0)
    for _ in range(count):
        aligned = np.abs(unit @ left)
        aligned[chosen] = -1
        chosen.append(int(aligned.argmax()))
        factors = np.linalg.lstsq(atoms[chosen].T, vector, rcond=None)[0]
        left = vector - atoms[chosen].T @ factors
    return dict(zip(chosen, factors, strict=True))


def test_pursuit_and_neighbours_are_those_of_a_dense_computation() -> None:
    """Atoms in blocks of any size give what all at once give; equal atoms are no trouble."""
    torch.manual_seed(0)
    atoms, vectors = torch.randn(50, 12), torch.randn(7, 12)
    vectors[0] = 2 * atoms[3] - 0.5 * atoms[40]

    def blocks():
        return ((start, atoms[start : start + 16]) for start in range(0, 50, 16))

    numbers, factors = matching_pursuit(vectors, blocks, lambda chosen: atoms[chosen], 4)
    for row in range(7):
        expected = by_hand(vectors[row].double().numpy(), atoms.double().numpy(), 4)
        found = dict(zip(numbers[row].tolist(), factors[row].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert all(abs(found[number] - expected[number]) < 1e-4 for number in found)
    numbers, factors = nearest_neighbours(vectors, blocks, 5)
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], atoms[None], dim=2)
    expected, order = cosines.topk(5, dim=1)
    assert torch.equal(numbers, order) and torch.allclose(factors, expected / expected.sum(1, keepdim=True), atol=1e-6)
    atoms[5] = atoms[4]
    assert matching_pursuit(vectors, blocks, lambda chosen: atoms[chosen], 12)[1].isfinite().all()
