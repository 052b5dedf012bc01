"""Fast products, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.kernels.product import fast_gram, product


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYOUTS = {
    "rows": lambda m, n: noise(m, n),
    "columns": lambda m, n: noise(n, m).T,
    "gaps": lambda m, n: noise(m, n + 7)[:, 3:-4],
    "every other": lambda m, n: noise(2 * m, n)[::2],
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 200, 100), (3, 1000, 900), (900, 1000, 3), (700, 1, 800), (5, 4, 3)])
def test_product_of_any_layout(left: str, right: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = LAYOUTS[left](m, k), LAYOUTS[right](k, n)
    found = product(a, b)
    assert found.shape == (m, n)
    np.testing.assert_allclose(found.numpy(), a.double().numpy() @ b.double().numpy(), atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    a, b = noise(300, 200).to(dtype), noise(200, 100).to(dtype)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2500, 600), (200, 1100), (7, 5), (4, 1)])
def test_gram_matrix_of_any_layout(layout: str, shape: tuple[int, int]) -> None:
    matrix = LAYOUTS[layout](*shape)
    found = fast_gram(matrix, 0.5)
    exact = matrix.double().numpy()
    np.testing.assert_allclose(found.numpy(), 0.25 * exact.T @ exact, atol=1e-5 * shape[0])
    tiny = fast_gram(matrix * 1e-25, 1e25)
    np.testing.assert_allclose(tiny.numpy(), exact.T @ exact, atol=1e-5 * shape[0])


def test_same_bytes_whatever_the_place_in_memory() -> None:
    a, b = noise(400, 300), noise(300, 200)
    expected = product(a, b)
    for offset in range(1, 16):
        room = torch.empty(a.numel() + 16)
        moved = room[offset : offset + a.numel()].view(a.shape).copy_(a)
        assert torch.equal(product(moved, b), expected)
