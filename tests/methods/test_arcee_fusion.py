"""``arcee_fusion`` against numpy, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.testing import apply_method, check_method


def draw(shape: tuple[int, ...], size: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, base + size * torch.randn(shape, generator=generator, dtype=torch.float64)


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def dense(base: np.ndarray, source: np.ndarray, reach: float = 1.5) -> np.ndarray:
    before, after = log_softmax(base), log_softmax(source)
    importance = np.abs(source - base) * (np.exp(after) * (after - before)).sum(axis=-1, keepdims=True)
    low, middle, high = np.quantile(importance, (0.25, 0.5, 0.75), method="lower")
    return np.where(importance >= middle + reach * (high - low), source, base)


def test_conformance() -> None:
    check_method("arcee_fusion")
    check_method("arcee_fusion", {"reach": 0.0}, identity=True)


@pytest.mark.parametrize("shape", [(30, 40), (17,), (3, 5, 7), (1, 9)])
@pytest.mark.parametrize("reach", [0.0, 0.5, 1.5])
def test_formula(shape: tuple[int, ...], reach: float) -> None:
    base, source = draw(shape)
    merged = apply_method("arcee_fusion", [base, source], params={"reach": reach})
    np.testing.assert_allclose(merged.numpy(), dense(base.numpy(), source.numpy(), reach), rtol=1e-12)


def test_float32_near_the_base() -> None:
    """Where the divergence is 1e-8, hundreds of roundings of float32 would decide."""
    base, source = (tensor.float() for tensor in draw((40, 50), 1e-4))
    merged = apply_method("arcee_fusion", [base, source])
    expected = dense(base.double().numpy(), source.double().numpy())
    agree = np.isclose(merged.double().numpy(), expected, rtol=0, atol=1e-7)
    assert agree.mean() > 0.999
    assert 0.02 < (merged != base).double().mean() < 0.3


def test_the_other_variant_is_the_same_where_roundings_do_not_count() -> None:
    base, source = draw((30, 40))
    exact = apply_method("arcee_fusion", [base, source])
    variant = apply_method("arcee_fusion", [base, source], params={"divergence": "float32"})
    assert (exact == variant).double().mean() > 0.995


def test_equal_models_are_that_model() -> None:
    base, _ = draw((5, 6))
    assert torch.equal(apply_method("arcee_fusion", [base, base]), base)
