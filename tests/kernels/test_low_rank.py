"""Factored matrices: every operation against the same on the dense product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_px.errors import NonFiniteError, TensorMismatchError
from mergekit_px.kernels.low_rank import LowRank, concatenate, cosine, shared_cores
from mergekit_px.kernels.svd import truncated_svd


def factored(m: int, n: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    b = torch.randn(m, rank, generator=random, dtype=torch.float64).to(dtype)
    a = torch.randn(rank, n, generator=random, dtype=torch.float64).to(dtype)
    return LowRank.from_adapter(b, a, 0.5)


def dense(value: LowRank) -> np.ndarray:
    return value.left.double().numpy() @ value.right.double().numpy().T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.integers(0, 6), st.integers(0, 9))
def test_algebra_is_that_of_the_products(m: int, n: int, first: int, second: int, seed: int) -> None:
    x, y = factored(m, n, first, seed, torch.float64), factored(m, n, second, seed + 1, torch.float64)
    np.testing.assert_allclose(dense(x + y), dense(x) + dense(y), atol=1e-12)
    np.testing.assert_allclose(dense(x.scaled(-3)), -3 * dense(x), atol=1e-12)
    assert x.inner(y) == pytest.approx(np.sum(dense(x) * dense(y)), abs=1e-10)
    assert x.norm() == pytest.approx(np.linalg.norm(dense(x)), abs=1e-10)
    assert (x + y).rank == first + second
    np.testing.assert_allclose(x.dense().numpy(), dense(x), atol=1e-12)


def test_decomposition_is_that_of_the_dense_product() -> None:
    value = factored(300, 200, 8)
    parts = value.svd()
    expected = truncated_svd(torch.from_numpy(dense(value)), 8, mode="dense")
    assert parts.rank == 8 and parts.mode == "factored"
    np.testing.assert_allclose(parts.s.numpy(), expected.s.numpy(), rtol=1e-6)
    np.testing.assert_allclose(parts.u.numpy(), expected.u.numpy(), atol=1e-6)
    np.testing.assert_allclose(parts.matrix().numpy(), dense(value), atol=1e-5)
    assert parts.captured_energy == pytest.approx(1.0)


def test_sum_of_duplicates_has_the_rank_of_one() -> None:
    value = factored(40, 30, 5)
    twice = value + value
    assert twice.rank == 10
    parts = twice.svd()
    assert parts.rank == 5
    np.testing.assert_allclose(parts.s.numpy(), 2 * value.svd().s.numpy(), rtol=1e-6)


def test_small_components_of_a_product_survive() -> None:
    u, _ = torch.linalg.qr(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)))
    value = LowRank(u * torch.tensor([1.0, 1e-3, 1e-8]), v)
    np.testing.assert_allclose(value.svd().s.numpy(), [1.0, 1e-3, 1e-8], rtol=1e-4)


def test_truncation_is_the_nearest_matrix_of_that_rank() -> None:
    value = factored(30, 25, 6, dtype=torch.float64)
    u, s, vh = np.linalg.svd(dense(value))
    parts = value.svd(2)
    np.testing.assert_allclose(dense(LowRank.from_svd(parts)), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-12)
    assert parts.captured_energy == pytest.approx(np.sum(s[:2] ** 2) / np.sum(s**2))


def test_rank_above_the_shape_and_zero_rank() -> None:
    wide = factored(4, 6, 9)
    assert wide.svd().rank == 4
    empty = factored(4, 6, 0)
    assert empty.norm() == 0.0
    assert empty.svd().rank == 0
    assert torch.equal(empty.dense(), torch.zeros(4, 6))
    assert LowRank(torch.zeros(4, 2), torch.ones(6, 2)).svd().rank == 0


def test_shared_cores_lose_nothing() -> None:
    terms = [factored(60, 50, rank, seed, torch.float64) for seed, rank in enumerate((3, 5, 1))]
    shared = shared_cores(terms)
    assert shared.left.shape == (60, 9) and shared.right.shape == (50, 9)
    for term, core in zip(terms, shared.cores, strict=True):
        np.testing.assert_allclose(dense(shared.expand(core)), dense(term), atol=1e-11)
    np.testing.assert_allclose(
        dense(shared.expand(sum(shared.cores, torch.zeros_like(shared.cores[0])))),
        dense(concatenate(terms)),
        atol=1e-11,
    )


def test_cosine() -> None:
    x = factored(20, 10, 3)
    assert cosine(x, x.scaled(-2)) == pytest.approx(-1.0)
    assert cosine(x, LowRank(torch.zeros(20, 1), torch.zeros(10, 1))) == 0.0


def test_dtype_is_kept() -> None:
    parts = factored(20, 10, 3).svd()
    assert parts.u.dtype == parts.s.dtype == parts.v.dtype == torch.float32


def test_bad_input() -> None:
    with pytest.raises(TensorMismatchError, match="do not fit one another"):
        LowRank(torch.ones(3, 2), torch.ones(4, 1))
    with pytest.raises(TensorMismatchError, match="different shapes"):
        factored(3, 4, 1) + factored(4, 3, 1)
    with pytest.raises(TensorMismatchError, match="different shapes"):
        factored(3, 4, 1).inner(factored(4, 3, 1))
    with pytest.raises(NonFiniteError, match="a factor holds a NaN"):
        LowRank(torch.tensor([[float("nan")], [1.0]]), torch.ones(3, 1)).svd()
