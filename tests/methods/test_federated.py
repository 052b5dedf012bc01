"""``fednova``, ``fedgma``, ``median`` and ``clipping`` against numpy, and as the averages that they become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.state_dicts import merge_state_dicts
from mergekit_px.testing import apply_method, check_method, merge_tensors

WEIGHTS = [0.5, 2.0, 1.5]


def draw(count: int, *, shape: tuple[int, ...] = (20, 30), seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + number) for number in range(count)]


def as_array(deltas: list[torch.Tensor]) -> np.ndarray:
    return np.stack([delta.numpy() for delta in deltas])


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("fednova", {}),
        ("fednova", {"steps": (100.0, 30.0, 7.0), "scale": 0.7}),
        ("fedgma", {}),
        ("fedgma", {"agreement": 0.9, "normalize": False}),
        ("clipping", {}),
        ("clipping", {"radius": 0.01, "norm_scope": "tensor"}),
    ],
)
def test_conformance_with_weights(method: str, params: dict[str, Any]) -> None:
    check_method(method, params, weights=WEIGHTS, symmetric=True)


@pytest.mark.parametrize("method", ["fednova", "fedgma", "median", "clipping"])
def test_conformance(method: str) -> None:
    check_method(method, identity=True, symmetric=True)
    check_method(method, sources=1, identity=True)


def test_fednova_weighs_each_step_of_training_alike() -> None:
    deltas, steps = draw(3), np.array([100.0, 30.0, 7.0])
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    expected = 0.7 * (shares @ steps) * np.tensordot(shares / steps, as_array(deltas), axes=1)
    merged = apply_method("fednova", deltas, WEIGHTS, {"steps": tuple(steps), "scale": 0.7})
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)


def test_fednova_of_equal_steps_is_the_average() -> None:
    deltas = draw(4)
    merged = apply_method("fednova", deltas, params={"steps": 50.0})
    np.testing.assert_allclose(merged.numpy(), as_array(deltas).mean(axis=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_fedgma_formula(count: int, agreement: float) -> None:
    deltas = draw(count)
    deltas[0][0] = 0.0
    stacked = as_array(deltas)
    score = np.abs(np.sign(stacked).mean(axis=0))
    expected = 1.5 * np.where(score >= agreement, 1.0, score) * stacked.sum(axis=0)
    merged = apply_method("fedgma", deltas, params={"agreement": agreement, "scale": 1.5, "normalize": False})
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_fedgma_without_a_threshold_is_the_average() -> None:
    deltas = draw(3)
    merged = apply_method("fedgma", deltas, WEIGHTS, {"agreement": 0.0})
    np.testing.assert_allclose(merged.numpy(), np.average(as_array(deltas), axis=0, weights=WEIGHTS), rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_median_formula(count: int) -> None:
    deltas = draw(count)
    expected = -0.5 * np.median(as_array(deltas), axis=0)
    np.testing.assert_allclose(apply_method("median", deltas, params={"scale": -0.5}).numpy(), expected, rtol=1e-15)


def test_median_ignores_a_wild_source() -> None:
    deltas = draw(3)
    wild = [*deltas[:2], deltas[2] + 1e9]
    low, high = np.sort(as_array(deltas[:2]), axis=0)
    merged = apply_method("median", wild).numpy()
    assert ((merged >= low) & (merged <= high)).all()


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_clipping_takes_the_norm_over_the_model(level: float) -> None:
    sources = [{"a": draw(3, seed=2)[n], "b": draw(3, shape=(7,), seed=3)[n]} for n in range(3)]
    norms = np.array([np.sqrt(sum(float((t * t).sum()) for t in source.values())) for source in sources])
    radius = norms.min() + level * (norms.max() - norms.min())
    factors = np.minimum(1.0, radius / norms) / 3
    merged = merge_tensors("clipping", sources, params={"level": level})
    for name in ("a", "b"):
        expected = np.tensordot(factors, as_array([source[name] for source in sources]), axes=1)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12, atol=1e-15)


def test_clipping_to_a_radius_by_tensor() -> None:
    deltas = draw(3)
    norms = np.sqrt((as_array(deltas) ** 2).sum(axis=(1, 2)))
    expected = np.tensordot(np.minimum(1.0, 30.0 / norms), as_array(deltas), axes=1)
    params = {"radius": 30.0, "norm_scope": "tensor", "normalize": False}
    np.testing.assert_allclose(apply_method("clipping", deltas, params=params).numpy(), expected, rtol=1e-12)


def test_clipping_of_zeros_and_at_the_largest_norm_is_the_average() -> None:
    zero = torch.zeros(4)
    assert torch.equal(apply_method("clipping", [zero, zero]), zero)
    deltas = draw(3)
    merged = apply_method("clipping", deltas, params={"level": 1.0})
    np.testing.assert_allclose(merged.numpy(), as_array(deltas).mean(axis=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", ["fednova", "fedgma", "clipping"])
def test_weights_that_cancel_are_refused(method: str) -> None:
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method(method, draw(2), [1.0, -1.0])


@pytest.mark.parametrize("method", ["fednova", "fedgma", "median", "clipping"])
def test_in_a_plan(method: str) -> None:
    """The engine gives what the definition gives."""
    base = {"a": draw(1, seed=5)[0].float(), "b": draw(1, shape=(7,), seed=6)[0].float()}
    sources = [{name: tensor + 0.1 * draw(3, seed=n)[0].float().reshape(-1)[: tensor.numel()].reshape(tensor.shape)
                for name, tensor in base.items()} for n in range(3)]  # fmt: skip
    merged = merge_state_dicts(sources, method, base=base)
    expected = merge_tensors(method, sources, base=base)
    for name in base:
        np.testing.assert_allclose(merged[name].numpy(), expected[name].numpy(), rtol=1e-6, atol=1e-6)
