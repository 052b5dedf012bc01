"""``linear`` against numpy, and its algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method

WEIGHT = st.floats(0.1, 10)


def draw(count: int, shape: tuple[int, ...] = (6, 7)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def dense(sources: list[torch.Tensor], weights: list[float], normalize: bool) -> np.ndarray:
    stacked = np.stack([source.numpy().astype(np.float64) for source in sources])
    total = np.einsum("i,i...->...", np.array(weights), stacked)
    return total / np.sum(weights) if normalize else total


def test_conformance() -> None:
    check_method("linear", identity=True, symmetric=True)
    check_method("linear", weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)
    check_method("linear", {"normalize": False}, weights=[0.5, -0.3, 0.2], symmetric=True)
    check_method("linear", sources=1, identity=True)


@pytest.mark.parametrize("normalize", [True, False])
@given(st.lists(WEIGHT, min_size=1, max_size=5))
def test_formula(normalize: bool, weights: list[float]) -> None:
    sources = draw(len(weights))
    merged = apply_method("linear", sources, weights, {"normalize": normalize})
    np.testing.assert_allclose(merged.numpy(), dense(sources, weights, normalize), rtol=1e-5, atol=1e-5)


def test_float64_sources_are_merged_in_float64() -> None:
    sources = [source.double() for source in draw(3)]
    merged = apply_method("linear", sources, [0.1, 0.2, 0.3])
    np.testing.assert_allclose(merged.numpy(), dense(sources, [0.1, 0.2, 0.3], True), rtol=1e-14, atol=1e-15)


@given(st.lists(WEIGHT, min_size=2, max_size=4), st.floats(0.01, 100))
def test_normalised_weights_matter_by_their_ratios_only(weights: list[float], factor: float) -> None:
    sources = draw(len(weights))
    scaled = apply_method("linear", sources, [weight * factor for weight in weights])
    torch.testing.assert_close(scaled, apply_method("linear", sources, weights), rtol=1e-5, atol=1e-6)


def test_a_source_of_weight_zero_takes_no_part() -> None:
    sources = draw(2)
    assert torch.equal(apply_method("linear", sources, [1.0, 0.0]), sources[0])


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [0.1, 0.2, -0.3]])
def test_weights_that_cancel_cannot_be_normalised(weights: list[float]) -> None:
    sources = draw(len(weights))
    with pytest.raises(UsageError, match="add up to zero") as raised:
        apply_method("linear", sources, weights)
    assert raised.value.hint is not None and "normalize" in raised.value.hint
    merged = apply_method("linear", sources, weights, {"normalize": False})
    np.testing.assert_allclose(merged.numpy(), dense(sources, weights, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(weight: float, normalize: bool) -> None:
    with pytest.raises(UsageError, match=f"a weight is {weight}"):
        apply_method("linear", draw(2), [1.0, weight], {"normalize": normalize})
