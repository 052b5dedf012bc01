"""``nuslerp`` and ``nuslerp_deltas`` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    first, second = (base + size * torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return base, first, second


def arc(x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    """The angle from half the chord, which is exact for small ones."""
    half_chord = np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y)) / 2
    angle = 2 * np.arcsin(np.clip(half_chord, 0, 1))
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def test_conformance() -> None:
    for method in ("nuslerp", "nuslerp_deltas"):
        check_method(method, identity=True, symmetric=True)
        check_method(method, weights=[0.7, 0.2], identity=True, symmetric=True)
        for along in ("rows", "columns"):
            check_method(method, {"along": along}, weights=[0.7, 0.2], identity=True, symmetric=True)


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_vectors_on_ways_of_their_own(along: str, size: float) -> None:
    base, first, second = draw(size)
    first[2], second[:, 3], second[4] = 2 * second[2], 0.0, -first[4]  # parallel, zero and opposite vectors
    axis = 1 if along == "rows" else 0
    for method, x, y in (("nuslerp", first, second), ("nuslerp_deltas", first - base, second - base)):
        merged = apply_method(method, [x, y], [0.3, 0.9], {"along": along}).numpy()
        pairs = zip(
            np.moveaxis(x.numpy(), axis, -1).reshape(-1, x.shape[axis]),
            np.moveaxis(y.numpy(), axis, -1).reshape(-1, x.shape[axis]),
            np.moveaxis(merged, axis, -1).reshape(-1, x.shape[axis]),
            strict=True,
        )
        for left, right, found in pairs:
            straight = not right.any() or abs(np.corrcoef(left, right)[0, 1]) > 1 - 1e-14
            expected = 0.25 * left + 0.75 * right if straight else arc(left, right, 0.75)
            np.testing.assert_allclose(found, expected, rtol=1e-6 if size < 1 else 1e-9, atol=1e-9)


def test_columns_of_tensors_of_more_axes() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    merged = apply_method("nuslerp", [first, second], [1.0, 1.0], {"along": "columns"})
    flat = apply_method("nuslerp", [first.reshape(4, 6), second.reshape(4, 6)], [1.0, 1.0], {"along": "columns"})
    torch.testing.assert_close(merged, flat.reshape(4, 2, 3))


@given(st.floats(0, 5), st.floats(0.1, 5))
def test_formula(left: float, right: float) -> None:
    _, first, second = draw()
    merged = apply_method("nuslerp", [first, second], [left, right])
    np.testing.assert_allclose(
        merged.numpy(), arc(first.numpy(), second.numpy(), right / (left + right)), rtol=1e-9, atol=1e-12
    )


@given(st.floats(0, 5), st.floats(0.1, 5))
def test_formula_on_task_vectors(left: float, right: float) -> None:
    base, first, second = draw(1e-3)
    merged = apply_method("nuslerp_deltas", [first, second], [left, right], base=base)
    expected = base.numpy() + arc((first - base).numpy(), (second - base).numpy(), right / (left + right))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
def test_small_angles_follow_the_arc(size: float) -> None:
    _, first, second = draw(size)
    merged = apply_method("nuslerp", [first, second], [0.3, 0.7])
    np.testing.assert_allclose(merged.numpy(), arc(first.numpy(), second.numpy(), 0.7), rtol=1e-12, atol=1e-13)


def test_parallel_opposite_and_zero_tensors_go_straight() -> None:
    _, first, _ = draw()
    for second in (2 * first, -2 * first, torch.zeros_like(first)):
        merged = apply_method("nuslerp", [first, second], [3.0, 1.0])
        torch.testing.assert_close(merged, 0.75 * first + 0.25 * second)


@pytest.mark.parametrize("weights", [[1.0, -0.5], [-3.0, 1.0]])
def test_weights_of_different_signs_are_refused(weights: list[float]) -> None:
    _, first, second = draw()
    with pytest.raises(UsageError, match="different signs"):
        apply_method("nuslerp", [first, second], weights)
