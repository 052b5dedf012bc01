"""Measures of spectra, against their definitions in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergekit_px.kernels.spectra import (
    alignment,
    alignment_rank,
    effective_rank,
    energy_kept,
    interference,
    noise_onset,
    rounding_noise_edge,
    source_shares,
    stable_rank,
    storage_dtype,
)
from mergekit_px.methods.matrices import Case


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edge_is_the_largest_singular_value_of_two_roundings(dtype: torch.dtype) -> None:
    base = noise(512, 384) * 0.02
    change = noise(512, 384, 1) * 0.02  # independent of the base, so that the two roundings are too
    rounding = (base + change).to(dtype).double() - base.to(dtype).double() - change.double()
    seen = float(torch.linalg.matrix_norm(rounding, 2))
    spread = math.sqrt(1.5)  # the source is sqrt(2) times as large as the base, the formula takes both alike
    assert rounding_noise_edge(base, dtype) * spread == pytest.approx(seen, rel=0.1)


def test_edge_of_a_sum_counts_the_base_once_for_all() -> None:
    base = (noise(300, 300) * 0.02).bfloat16().float()
    sources = [(base + noise(300, 300, seed) * 0.01).bfloat16().float() for seed in (1, 2, 3, 4)]
    exact = [base + noise(300, 300, seed) * 0.01 for seed in (1, 2, 3, 4)]
    total = sum((s - e for s, e in zip(sources, exact, strict=True)), torch.zeros(300, 300))
    case = Case("", (300, 300), (1.0,) * 4, rounding_noise_edge(base))
    assert case.sum_edge() == pytest.approx(case.noise * math.sqrt(10))
    # Only the sources are rounded here, so the noise stays below the edge, which allows for the base's too.
    assert float(torch.linalg.matrix_norm(total, 2)) < case.sum_edge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtype_is_read_off_the_values(dtype: torch.dtype) -> None:
    stored = (noise(64, 64) * 0.02).to(dtype)
    assert storage_dtype(stored.float()) == dtype
    assert storage_dtype(stored.double()) == dtype


def test_edge_of_float32_storage_is_negligible_and_of_a_constant_zero() -> None:
    base = noise(64, 64)
    assert rounding_noise_edge(base) < 2e-5 * rounding_noise_edge(base.bfloat16())
    assert rounding_noise_edge(torch.ones(4, 4)) == 0.0
    assert rounding_noise_edge(torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize("signals", [0, 5])
def test_noise_onset_finds_the_components_above_noise(signals: int) -> None:
    u, _ = torch.linalg.qr(noise(300, 8))
    v, _ = torch.linalg.qr(noise(200, 8, 1))
    edge = math.sqrt(300) + math.sqrt(200)
    matrix = noise(300, 200, 2) + (u[:, :signals] * (2 * edge)) @ v[:, :signals].T
    values = torch.linalg.svdvals(matrix.double())
    assert noise_onset(values[:40], float(matrix.double().square().sum()), (300, 200)) == signals


def test_noise_onset_counts_all_of_a_steep_spectrum() -> None:
    values = 2.0 ** -torch.arange(10.0)
    assert noise_onset(values, float(values.square().sum()) * 1.000001, (100, 80)) == 10


def test_ranks_and_energy() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 1e-9])
    share = np.array([0.5, 0.25, 0.25])
    assert effective_rank(values) == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.zeros(3)) == 0.0
    assert stable_rank(values) == pytest.approx(1.5)
    assert stable_rank(torch.zeros(0)) == 0.0
    assert energy_kept(values, 1) == pytest.approx(4 / 6)
    assert energy_kept(torch.zeros(2), 1) == 1.0


def test_interference_is_its_formula_and_zero_for_orthogonal_sources() -> None:
    u = torch.cat([torch.linalg.qr(noise(20, 3, seed))[0] for seed in (0, 1)], dim=1)
    v = torch.cat([torch.linalg.qr(noise(15, 3, seed))[0] for seed in (2, 3)], dim=1)
    s = torch.rand(6, generator=torch.Generator().manual_seed(4)) + 0.1
    left, right = u.numpy().astype(float), v.numpy().astype(float)
    expected = np.abs((left.T @ left - np.eye(6)) @ np.diag(s.numpy()) @ (right.T @ right - np.eye(6))).sum()
    assert interference(u, s, v) == pytest.approx(expected, rel=1e-5)
    apart = torch.eye(20)[:, :6]
    assert interference(apart, s, torch.eye(15)[:, :6]) == 0.0


def test_alignment_is_the_share_inside_the_subspace() -> None:
    delta = noise(12, 9)
    basis, _ = torch.linalg.qr(noise(12, 4, 1))
    expected = np.linalg.norm((basis @ basis.T @ delta).numpy()) / np.linalg.norm(delta.numpy())
    assert alignment(delta, basis) == pytest.approx(expected, rel=1e-5)
    assert alignment(basis @ noise(4, 9, 2), basis) == pytest.approx(1.0, abs=1e-6)
    assert alignment(torch.zeros(12, 9), basis) == 1.0


def test_alignment_rank_is_the_smallest_that_comes_within_the_error() -> None:
    values = torch.tensor([3.0, 4.0, 12.0]).sort(descending=True).values
    # norms of the remainders, of 13: 5 after one component, 3 after two, 0 after three
    assert alignment_rank(values, 5.01 / 13) == 1
    assert alignment_rank(values, 4.99 / 13) == 2
    assert alignment_rank(values, 2.99 / 13) == 3
    assert alignment_rank(torch.zeros(3)) == 0


def test_source_shares() -> None:
    shares = source_shares(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 2, 0]), 3)
    assert shares == pytest.approx([13 / 14, 0.0, 1 / 14])
    assert source_shares(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2) == [0.0, 0.0]
