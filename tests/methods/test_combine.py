"""``combine`` against numpy, and the arithmetic of task vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(4, 9, generator=generator) for _ in range(count)]


def test_conformance() -> None:
    check_method("combine", symmetric=True)
    check_method("combine", weights=[1.0, 1.0, -1.0], identity=True, symmetric=True)
    check_method("combine", weights=[-1.0])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=5))
def test_formula(weights: list[float]) -> None:
    sources = draw(len(weights))
    expected = sum(w * s.numpy().astype(np.float64) for w, s in zip(weights, sources, strict=True))
    np.testing.assert_allclose(apply_method("combine", sources, weights).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_difference_and_its_base_give_the_model_back() -> None:
    base, tuned = (tensor.bfloat16().float() for tensor in draw(2))
    delta = apply_method("combine", [tuned, base], [1.0, -1.0])
    torch.testing.assert_close(apply_method("combine", [base, delta], [1.0, 1.0]), tuned, rtol=1e-6, atol=1e-7)


def test_a_task_vector_and_its_negative_cancel() -> None:
    delta = draw(1)[0]
    negative = apply_method("combine", [delta], [-1.0])
    assert torch.equal(apply_method("combine", [delta, negative]), torch.zeros_like(delta))


def test_an_analogy_of_equal_terms_is_the_third() -> None:
    left, third = draw(2)
    torch.testing.assert_close(apply_method("combine", [third, left, left], [1.0, 1.0, -1.0]), third)


def test_weights_are_finite() -> None:
    with pytest.raises(UsageError, match="a weight is nan"):
        apply_method("combine", draw(1), [float("nan")])
