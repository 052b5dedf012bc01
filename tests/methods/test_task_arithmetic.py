"""``task_arithmetic`` against numpy, and its algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(5, 8, generator=generator)
    return base, [base + 0.1 * torch.randn(5, 8, generator=generator) for _ in range(count)]


def test_conformance() -> None:
    check_method("task_arithmetic", symmetric=True)
    check_method("task_arithmetic", {"scale": 0.4}, weights=[0.5, -0.3, 0.2], symmetric=True)
    check_method("task_arithmetic", {"normalize": True}, weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=4), st.floats(-2, 2), st.booleans())
def test_formula(weights: list[float], scale: float, normalize: bool) -> None:
    base, sources = draw(len(weights))
    theta = base.numpy().astype(np.float64)
    tau = sum(w * (s.numpy().astype(np.float64) - theta) for w, s in zip(weights, sources, strict=True))
    expected = theta + scale * tau / (sum(weights) if normalize else 1)
    params = {"scale": scale, "normalize": normalize}
    merged = apply_method("task_arithmetic", sources, weights, params, base=base)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_scale_zero_is_the_base() -> None:
    base, sources = draw(3)
    assert torch.equal(apply_method("task_arithmetic", sources, params={"scale": 0}, base=base), base)


def test_one_whole_task_vector_is_the_fine_tune() -> None:
    base, sources = draw(1)
    torch.testing.assert_close(apply_method("task_arithmetic", sources, base=base), sources[0])


def test_the_mean_of_task_vectors_is_the_mean_of_models() -> None:
    base, sources = draw(4)
    merged = apply_method("task_arithmetic", sources, [0.25] * 4, base=base)
    torch.testing.assert_close(merged, apply_method("linear", sources), rtol=1e-5, atol=1e-6)


def test_a_task_learned_and_forgotten_leaves_the_base() -> None:
    base, sources = draw(1)
    torch.testing.assert_close(apply_method("task_arithmetic", sources * 2, [1.0, -1.0], base=base), base)


def test_without_a_base_sources_are_task_vectors() -> None:
    base, sources = draw(2)
    delta = apply_method("task_arithmetic", [source - base for source in sources], [0.4, 0.6])
    torch.testing.assert_close(delta + base, apply_method("task_arithmetic", sources, [0.4, 0.6], base=base))


def test_weights_that_cancel_cannot_be_normalised() -> None:
    base, sources = draw(2)
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method("task_arithmetic", sources, [1.0, -1.0], {"normalize": True}, base=base)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_is_finite(scale: float) -> None:
    base, sources = draw(1)
    with pytest.raises(ValidationError, match="finite"):
        apply_method("task_arithmetic", sources, params={"scale": scale}, base=base)
