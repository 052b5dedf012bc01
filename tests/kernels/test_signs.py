"""Trimming, elections and disjoint sums against numpy and against exact integer votes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergekit_px.kernels.signs import disjoint_sum, elect_signs, trim

NO_CUTS = (0.0, 0.0, 0.0)


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_trim_keeps_what_is_above_the_cut() -> None:
    values = torch.tensor([-3.0, -2.0, -0.0, 1.0, 2.0, 3.0, float("nan"), float("inf")])
    assert trim(values, 2.0).nan_to_num(nan=9.0, posinf=8.0).tolist() == [-3.0, 0.0, 0.0, 0.0, 0.0, 3.0, 9.0, 8.0]
    assert trim(values[:6], 0.0).tolist() == values[:6].tolist()
    assert trim(values[:6], float("inf")).tolist() == [0.0] * 6


def test_a_float64_cut_is_exact_for_float32_values() -> None:
    value = np.float32(0.1)
    assert trim(torch.tensor([value]), float(value) - 1e-12).item() == value
    assert trim(torch.tensor([value]), float(value)).item() == 0
    assert trim(torch.tensor([value]), float(value) + 1e-12).item() == 0


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (0.6, -0.4, 0.1), (0.0, 1.0, 2.0)])
@pytest.mark.parametrize("vote", ["sum", "count"])
def test_elections_on_random_values(coefficients: tuple[float, ...], vote: str) -> None:
    tensors = [draw(5000, seed) for seed in range(3)]
    values = np.stack([t.numpy().astype(np.float64) * c for t, c in zip(tensors, coefficients, strict=True)])
    expected = np.sign((np.sign(values) if vote == "count" else values).sum(axis=0))
    elected = elect_signs(tensors, coefficients, NO_CUTS, vote=vote, tie="zero")  # type: ignore[arg-type]
    np.testing.assert_array_equal(elected.numpy(), expected)


@pytest.mark.parametrize("weights", [(5, 3, 2), (6, 4, -2), (1, 1, 1), (3, 3, 3), (7, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_votes_that_cancel_are_ties_whatever_the_rounding(weights: tuple[int, ...], dtype: torch.dtype) -> None:
    """All small multiples of a unit, with weights of tenths, which floats cannot hold."""
    votes = np.array(list(itertools.product(range(-6, 7), repeat=3))).T
    exact = np.sign((np.array(weights)[:, None] * votes).sum(axis=0))
    assert (exact == 0).sum() > 10
    tensors = [torch.tensor(row, dtype=dtype) * 2.0**-14 for row in votes]
    coefficients = [weight / 10 for weight in weights]
    zero = elect_signs(tensors, coefficients, NO_CUTS, vote="sum", tie="zero")
    positive = elect_signs(tensors, coefficients, NO_CUTS, vote="sum", tie="positive")
    np.testing.assert_array_equal(zero.numpy(), exact)
    np.testing.assert_array_equal(positive.numpy(), np.where(exact < 0, -1, 1))


@pytest.mark.parametrize("shares", [None, (1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (0.5, -0.3, 0.2)])
@pytest.mark.parametrize("orientations", [(1.0, 1.0, 1.0), (1.0, -1.0, 0.0)])
def test_disjoint_sums(shares: tuple[float, ...] | None, orientations: tuple[float, ...]) -> None:
    tensors = [draw(5000, seed) for seed in range(3)]
    tensors[0][:100] = 0
    signs = draw(5000, 3).sign()
    signs[50:200] = 0
    coefficients, cuts = (0.5, -0.3, 0.2), (0.1, 0.0, 0.7)
    values = np.stack([tensor.numpy() for tensor in tensors])
    oriented = values * np.array(orientations)[:, None] * signs.numpy()
    agreeing = (oriented > 0) & (np.abs(values) > np.array(cuts)[:, None])
    expected = (agreeing * values.astype(np.float64) * np.array(coefficients)[:, None]).sum(axis=0)
    if shares is not None:
        divisor = (agreeing * np.array(shares)[:, None]).sum(axis=0)
        expected = expected / np.where(np.abs(divisor) < 1e-9, 1, divisor)
    merged = disjoint_sum(tensors, signs, coefficients, cuts, orientations=orientations, shares=shares)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_divisor_that_cancels_counts_as_one() -> None:
    tensors = [torch.tensor([1.0, 2.0])] * 3
    merged = disjoint_sum(
        tensors, torch.ones(2), (1.0, 1.0, 1.0), NO_CUTS, orientations=(1.0, 1.0, 1.0), shares=(0.1, 0.2, -0.3)
    )
    assert merged.tolist() == [3.0, 6.0]


def test_a_cut_beyond_float32_trims_everything() -> None:
    assert trim(torch.tensor([torch.finfo(torch.float32).max]), 1e300).item() == 0


def test_nan_is_not_hidden() -> None:
    tensors = [torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])]
    signs = elect_signs(tensors, (1.0, 1.0), (0.5, 0.5), vote="sum", tie="zero")
    merged = disjoint_sum(tensors, signs, (1.0, 1.0), (0.5, 0.5), orientations=(1.0, 1.0), shares=(1.0, 1.0))
    assert merged.isnan().tolist() == [True, False]
