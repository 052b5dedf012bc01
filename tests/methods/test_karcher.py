"""``karcher`` against the fixed point in full dimension, and its geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(count: int, shared: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    return [
        (1 + i) * (shared * common + torch.randn(8, 9, generator=generator, dtype=torch.float64)) for i in range(count)
    ]


def log_map(at: np.ndarray, point: np.ndarray) -> np.ndarray:
    cosine = np.clip(np.vdot(at, point), -1, 1)
    tangent = point - cosine * at
    size = np.linalg.norm(tangent)
    return np.arccos(cosine) * tangent / size if size > 0 else tangent


def dense(sources: list[torch.Tensor], weights: np.ndarray) -> np.ndarray:
    """500 short steps along the mean of the logarithms."""
    vectors = [source.numpy().reshape(-1) for source in sources]
    norms = np.array([np.linalg.norm(vector) for vector in vectors])
    units = [vector / norm for vector, norm in zip(vectors, norms, strict=True)]
    mean = units[0]
    for _ in range(500):
        step = 0.5 * sum(w * log_map(mean, unit) for w, unit in zip(weights, units, strict=True))
        size = np.linalg.norm(step)
        mean = mean if size == 0 else np.cos(size) * mean + np.sin(size) * step / size
    return (weights @ norms * mean).reshape(sources[0].shape)


def test_conformance() -> None:
    check_method("karcher", identity=True, symmetric=True)
    check_method("karcher", weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)
    check_method("karcher", {"iterations": 0}, sources=2, identity=True)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize("shared", [0.5, 2.0])
def test_formula(weights: list[float], shared: float) -> None:
    sources = draw(4, shared)
    expected = dense(sources, np.array(weights) / sum(weights))
    np.testing.assert_allclose(apply_method("karcher", sources, weights).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_two_sources_meet_in_the_middle_of_the_arc() -> None:
    first, second = draw(2)
    first, second = first / first.norm(), second / second.norm()
    torch.testing.assert_close(
        apply_method("karcher", [first, second]), apply_method("slerp", [first, second]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("share", [0.1, 0.25, 0.8])
def test_two_weighted_sources_divide_the_arc(share: float) -> None:
    first, second = draw(2)
    first, second = first / first.norm(), second / second.norm()
    torch.testing.assert_close(
        apply_method("karcher", [first, second], [1 - share, share]),
        apply_method("slerp", [first, second], params={"t": share}),
        rtol=1e-6,
        atol=1e-7,
    )


def test_the_norm_is_the_mean_of_the_norms() -> None:
    sources = draw(3)
    norms = torch.stack([source.norm() for source in sources])
    assert apply_method("karcher", sources).norm().item() == pytest.approx(norms.mean().item())


def test_a_zero_tensor_has_no_direction() -> None:
    first = draw(1)[0]
    zero = torch.zeros_like(first)
    torch.testing.assert_close(apply_method("karcher", [first, zero]), first / 2)
    torch.testing.assert_close(apply_method("karcher", [zero, first], [1.0, 3.0]), 0.75 * first)
    assert torch.equal(apply_method("karcher", [zero, zero]), zero)


def test_opposite_tensors_give_the_first_direction() -> None:
    first = draw(1)[0]
    torch.testing.assert_close(apply_method("karcher", [first, -3 * first]), 2 * first)


def test_weights_are_not_negative() -> None:
    with pytest.raises(UsageError, match="a weight is negative"):
        apply_method("karcher", draw(2), [2.0, -1.0])
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method("karcher", draw(2), [0.0, 0.0])


def test_non_finite_sources_are_not_hidden() -> None:
    first, second = draw(2)
    first[0, 0] = float("nan")
    assert apply_method("karcher", [first, second]).isnan().any()
