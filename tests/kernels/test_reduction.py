"""Sums over sources and elements against numpy and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mergekit_px.kernels.reduction import absolute_sum, element_sum, gram, integer_ratio, weighted_sum


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_weighted_sum_is_the_linear_combination() -> None:
    tensors = [draw(3, 50, seed=i) for i in range(3)]
    coefficients = [0.3, -1.7, 4.0]
    expected = sum(c * t.numpy().astype(np.float64) for c, t in zip(coefficients, tensors, strict=True))
    np.testing.assert_allclose(weighted_sum(tensors, coefficients).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [
        ((0.5, 0.3, 0.2), ((5.0, 3.0, 2.0), 10.0)),
        ((1 / 3, 2 / 3), ((1.0, 2.0), 3.0)),
        ((0.1 * 0.7, -0.25), ((7.0, -25.0), 100.0)),
        ((1.0, 0.0, -2.0), ((1.0, 0.0, -2.0), 1.0)),
        ((0.123456789, 0.5), ((0.123456789, 0.5), 1.0)),
        ((1e9, 0.5), ((1e9, 0.5), 1.0)),
        ((1e-9, 0.5), ((1e-9, 0.5), 1.0)),
    ],
)
def test_coefficients_as_ratios_of_integers(
    coefficients: tuple[float, ...], expected: tuple[tuple[float, ...], float]
) -> None:
    assert integer_ratio(coefficients) == expected


def test_decimal_coefficients_of_bfloat16_numbers_are_rounded_once() -> None:
    """Exact fractions decide, where the sum lies halfway between two bfloat16 numbers too."""
    tensors = [(draw(2000, seed=i) * 0.02).bfloat16() for i in range(3)]
    merged = weighted_sum([t.float() for t in tensors], [0.5, 0.3, 0.2])
    weights = [Fraction(5, 10), Fraction(3, 10), Fraction(2, 10)]
    exact = [
        sum(w * Fraction(v) for w, v in zip(weights, values, strict=True))
        for values in zip(*(t.tolist() for t in tensors), strict=True)
    ]
    halfway = sum(1 for value in exact if (value * 2**17).denominator == 1 and value * 2**16 % 1)
    assert halfway > 20
    singles = np.array([np.float32(float(value)) for value in exact])
    np.testing.assert_array_equal(merged.bfloat16().float().numpy(), torch.from_numpy(singles).bfloat16().float())


def test_a_coefficient_of_zero_leaves_a_tensor_out() -> None:
    broken = torch.full((4,), float("nan"))
    assert torch.equal(weighted_sum([broken, draw(4)], [0.0, 1.0]), draw(4))
    assert torch.equal(weighted_sum([draw(4)], [0.0]), torch.zeros(4))


def test_a_lone_tensor_is_copied_bit_for_bit() -> None:
    source = torch.tensor([-0.0, 0.0, 1e-45, float("inf")])
    copy = weighted_sum([source], [1.0])
    assert torch.equal(copy.view(torch.int32), source.view(torch.int32))
    assert copy.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 100_003])
def test_element_sum_has_double_precision(count: int) -> None:
    values = draw(count) * 1e4 + 1e-3
    total = element_sum(values)
    assert total.dtype == torch.float64 and total.shape == ()
    exact = math.fsum(values.tolist())
    assert abs(total.item() - exact) <= 1e-12 * math.fsum(map(abs, values.tolist()))
    assert absolute_sum(values).item() == pytest.approx(math.fsum(map(abs, values.tolist())), rel=1e-13)


def test_sums_do_not_depend_on_threads() -> None:
    values = draw(300_000)
    threads = torch.get_num_threads()
    try:
        results = set()
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.add((element_sum(values).item(), gram([values, values.flip(0)])[0, 1].item()))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


@pytest.mark.parametrize("elements", [1, 4095, 4096, 70_001])
def test_gram_sums_row_after_row_then_half_to_half(elements: int) -> None:
    left, right = draw(elements), draw(elements, seed=1)
    products = np.zeros(-(-elements // 4096) * 4096)
    products[:elements] = left.numpy().astype(np.float64) * right.numpy().astype(np.float64)
    row = sum(products.reshape(-1, 4096), np.zeros(4096)).tolist()
    while len(row) > 1:
        half = len(row) // 2
        row = [first + second for first, second in zip(row[:half], row[half:], strict=True)]
    assert gram([left, right])[1, 0].item() == gram([left, right])[0, 1].item() == row[0]


def test_gram_has_double_precision() -> None:
    tensors = [draw(70, 100, seed=i) * 1e-25 for i in range(3)]
    stacked = np.stack([t.numpy().astype(np.float64).reshape(-1) for t in tensors])
    result = gram(tensors)
    assert torch.equal(result, result.T)
    np.testing.assert_allclose(result.numpy(), stacked @ stacked.T, rtol=1e-12, atol=1e-60)
