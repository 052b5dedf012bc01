"""The pool of components: order, growth, storage, factored sources."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergekit_px.errors import NonFiniteError, TensorMismatchError, UsageError
from mergekit_px.kernels.low_rank import LowRank
from mergekit_px.kernels.pool import ComponentPool, PoolRule

RULES: tuple[PoolRule, ...] = ("matrix", "quota", "normalised")


def draw(count: int, shape: tuple[int, int] = (20, 16)) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random) * (1 + number) for number in range(count)]


def filled(deltas: list[torch.Tensor], limit: int | None, rule: PoolRule = "matrix") -> ComponentPool:
    pool = ComponentPool(limit, rule)
    for delta in deltas:
        pool.add(delta)
    return pool


def kept(pool: ComponentPool) -> list[tuple[int, float]]:
    return [(int(source), round(float(value), 4)) for source, value in zip(pool.source, pool.s, strict=True)]


def expected(deltas: list[torch.Tensor], limit: int, rule: PoolRule) -> list[tuple[int, float]]:
    members = []
    for number, delta in enumerate(deltas):
        values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
        size = np.linalg.norm(delta.double().numpy())
        for order, value in enumerate(values):
            key = {"matrix": (-value,), "quota": (order, -value), "normalised": (-value / size,)}[rule]
            members.append((key, number, round(float(value), 4)))
    return [(number, value) for _, number, value in sorted(members)[:limit]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [1, 4, 11, 64])
def test_the_first_of_all_components_are_kept(rule: PoolRule, limit: int) -> None:
    deltas = draw(3)
    seen, wanted = kept(filled(deltas, limit, rule)), expected(deltas, limit, rule)
    assert [source for source, _ in seen] == [source for source, _ in wanted]
    np.testing.assert_allclose([value for _, value in seen], [value for _, value in wanted], atol=2e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_source_added_later_gives_what_a_run_from_scratch_gives(rule: PoolRule) -> None:
    deltas = draw(5)
    whole = filled(deltas, 9, rule)
    stored = {name: part.clone() for name, part in filled(deltas[:3], 9, rule).state().items()}
    grown = ComponentPool.from_state(stored, 9, rule)
    for delta in deltas[3:]:
        grown.add(delta)
    for name, part in whole.state().items():
        assert torch.equal(part, grown.state()[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_pools_of_pools_are_pools_of_everything(rule: PoolRule) -> None:
    deltas = draw(5)
    whole = filled(deltas, 7, rule)
    first, second = filled(deltas[:2], 7, rule), filled(deltas[2:], 7, rule)
    first.merge(second)
    for name, part in whole.state().items():
        assert torch.equal(part, first.state()[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_order_of_addition_does_not_matter(rule: PoolRule) -> None:
    deltas = draw(3)
    sums = [filled(list(order), 8, rule).sum().dense() for order in itertools.permutations(deltas)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_memory_is_that_of_the_limit_however_many_sources() -> None:
    pool = ComponentPool(5)
    for delta in draw(30):
        pool.add(delta)
        assert pool.u.shape[1] <= 5 and pool.v.shape[1] <= 5
    assert len(pool.energies) == 30


def test_ties_go_to_the_source_added_first() -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    pool = filled([delta, delta.clone()], 3)
    assert pool.source.tolist() == [0, 1, 0]


def test_factored_sources_give_what_dense_ones_give() -> None:
    random = torch.Generator().manual_seed(0)
    factored = [LowRank(torch.randn(30, 4, generator=random), torch.randn(24, 4, generator=random)) for _ in range(3)]
    dense, thin = ComponentPool(6), ComponentPool(6)
    for value in factored:
        dense.add(value.dense())
        thin.add(value)
    torch.testing.assert_close(thin.sum().dense(), dense.sum().dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(thin.orthogonalised().dense(), dense.orthogonalised().dense(), rtol=1e-4, atol=1e-5)
    assert thin.energies == pytest.approx(dense.energies, rel=1e-6)


def test_weights_multiply_the_source() -> None:
    first, second = draw(2)
    weighted = ComponentPool(6)
    weighted.add(first, -2.0)
    weighted.add(second, 0.5)
    torch.testing.assert_close(weighted.sum().dense(), filled([-2 * first, 0.5 * second], 6).sum().dense())
    assert weighted.energies == pytest.approx(filled([-2 * first, 0.5 * second], 6).energies)
    assert bool((weighted.s > 0).all())


def test_sum_decomposes_exactly() -> None:
    pool = filled(draw(3), 6)
    parts = pool.sum().svd()
    torch.testing.assert_close(parts.matrix(), (pool.u * pool.s) @ pool.v.T)
    assert parts.rank == 6


def test_orthogonalised_vectors_are_orthonormal() -> None:
    value = filled(draw(3), 8).orthogonalised()
    assert float((value.right.T @ value.right - torch.eye(8)).abs().max()) < 1e-5
    unit = value.left / value.left.norm(dim=0)
    assert float((unit.T @ unit - torch.eye(8)).abs().max()) < 1e-5


def test_zero_source_and_zero_pool() -> None:
    pool = filled([torch.zeros(4, 3)], 2)
    assert pool.s.numel() == 0
    assert torch.equal(pool.sum().dense(), torch.zeros(4, 3))
    assert torch.equal(pool.orthogonalised().dense(), torch.zeros(4, 3))
    pool.add(torch.eye(4, 3))
    assert pool.source.tolist() == [1, 1]


def test_bad_input() -> None:
    with pytest.raises(UsageError, match=r"^w: a pool keeps at least one component, got 0$"):
        ComponentPool(0, label="w")
    with pytest.raises(UsageError, match="has no source yet"):
        ComponentPool(3).sum()
    with pytest.raises(UsageError, match="cannot be merged"):
        ComponentPool(3).merge(ComponentPool(4))
    pool = filled(draw(1), 3)
    with pytest.raises(TensorMismatchError, match=r"a source of shape \(3, 4\) does not fit a pool of \(20, 16\)"):
        pool.add(torch.ones(3, 4))
    with pytest.raises(NonFiniteError):
        pool.add(torch.full((20, 16), float("nan")))
