"""``multislerp`` and ``multislerp_deltas`` against numpy, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    return [(1 + i) * (common + torch.randn(8, 9, generator=generator, dtype=torch.float64)) for i in range(count)]


def dense(vectors: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    norms = np.array([np.linalg.norm(vector) for vector in vectors])
    units = np.stack([vector / norm for vector, norm in zip(vectors, norms, strict=True)])
    mean = np.einsum("i,i...->...", weights, units)
    mean /= np.linalg.norm(mean)
    tangents = units - (units * mean).sum(axis=(1, 2), keepdims=True) * mean
    step = np.einsum("i,i...->...", weights, tangents)
    angle = np.linalg.norm(step)
    return (weights @ norms) * (np.cos(angle) * mean + np.sinc(angle / np.pi) * step)


def test_conformance() -> None:
    for method in ("multislerp", "multislerp_deltas"):
        check_method(method, identity=True, symmetric=True)
        check_method(method, weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)
        check_method(method, {"normalize": False}, weights=[0.5, -0.3, 0.6], symmetric=True)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.7], [2.0, -0.5, 0.0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_formula(weights: list[float], normalize: bool) -> None:
    sources = draw(3)
    shares = np.array(weights) / (sum(weights) if normalize else 1)
    merged = apply_method("multislerp", sources, weights, {"normalize": normalize})
    np.testing.assert_allclose(merged.numpy(), dense([s.numpy() for s in sources], shares), rtol=1e-9, atol=1e-12)


def test_formula_on_task_vectors() -> None:
    base, *sources = draw(4)
    merged = apply_method("multislerp_deltas", sources, [0.5, 0.3, 0.2], base=base)
    deltas = [(source - base).numpy() for source in sources]
    expected = base.numpy() + dense(deltas, np.array([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_one_source_is_itself() -> None:
    source = draw(1)[0]
    torch.testing.assert_close(apply_method("multislerp", [source], [3.0]), source)


def test_directions_that_cancel_and_zero_tensors_go_straight() -> None:
    source = draw(1)[0]
    torch.testing.assert_close(apply_method("multislerp", [source, -3 * source]), -source)
    assert torch.equal(apply_method("multislerp", [0 * source, 0 * source]), 0 * source)


def test_weights_that_cancel_cannot_be_normalised() -> None:
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method("multislerp", draw(2), [1.0, -1.0])
