"""``dare_linear`` and ``dare_ties`` against numpy on the same masks, their expectation and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.kernels.random import RandomStream
from mergekit_px.methods import find_method
from mergekit_px.testing import apply_method, check_method, merge_tensors

WEIGHTS = [0.5, 0.3, -0.2]
METHODS = ["dare_linear", "dare_ties"]


def draw(shape: tuple[int, ...] = (40, 50), count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1 + i) * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(count)]


def masks(shape: tuple[int, ...], densities: list[float], seed: int) -> list[np.ndarray]:
    stream = RandomStream(seed, "t", 0, int(np.prod(shape)))
    return [
        (stream.uniform(source).numpy() < np.float32(density)).reshape(shape)
        for source, density in enumerate(densities)
    ]


def thinned(deltas: list[torch.Tensor], densities: list[float], seed: int, rescale: str) -> np.ndarray:
    kept = masks(tuple(deltas[0].shape), densities, seed)
    thin = np.stack([delta.numpy() * mask for delta, mask in zip(deltas, kept, strict=True)])
    for row, delta, density in zip(thin, deltas, densities, strict=True):
        if rescale == "density" and density:
            row /= density
        elif rescale == "l1" and density:
            row *= np.abs(delta.numpy()).sum() / np.abs(row).sum()
    return thin


@pytest.mark.parametrize("method", METHODS)
def test_conformance(method: str) -> None:
    check_method(method)
    check_method(method, {"density": [0.1, 0.5, 1.0], "rescale": "none"}, weights=WEIGHTS)
    check_method(method, {"density": [0.0, 0.5, 0.9], "rescale": "l1"}, weights=WEIGHTS)
    check_method(method, {"density": 1.0}, weights=[1.0, 2.0, 3.0], symmetric=True)
    for preset in ("mergekit", "peft"):
        check_method(method, {**find_method(method).presets[preset], "density": 0.7}, weights=WEIGHTS)


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("densities", [[0.5, 0.5, 0.5], [0.1, 0.9, 1.0], [0.0, 0.3, 0.7]])
def test_dare_linear_formula(rescale: str, densities: list[float]) -> None:
    deltas = draw()
    merged = apply_method(
        "dare_linear", deltas, WEIGHTS, {"density": densities, "rescale": rescale, "scale": 0.7}, seed=4
    )
    expected = 0.7 * np.einsum("i,i...->...", np.array(WEIGHTS), thinned(deltas, densities, 4, rescale))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("densities", [[0.5, 0.5, 0.5], [0.1, 0.9, 1.0], [0.0, 0.3, 0.7]])
@pytest.mark.parametrize("divide_by", ["weights", "count", "nothing"])
def test_dare_ties_formula(rescale: str, densities: list[float], divide_by: str) -> None:
    deltas = draw()
    params = {"density": densities, "rescale": rescale, "scale": 0.7, "divide_by": divide_by}
    merged = apply_method("dare_ties", deltas, WEIGHTS, params, seed=4)
    column = np.array(WEIGHTS).reshape(3, 1, 1)
    weighted = column * thinned(deltas, densities, 4, rescale)
    agreeing = (np.sign(weighted) == np.sign(weighted.sum(axis=0))) & (weighted != 0)
    divisor = {"weights": column * agreeing, "count": agreeing, "nothing": 0 * agreeing}[divide_by].sum(axis=0)
    expected = 0.7 * (weighted * agreeing).sum(axis=0) / np.where(np.abs(divisor) < 1e-9, 1, divisor)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_expectation_is_task_arithmetic() -> None:
    deltas, seeds, density = draw((20, 20)), 400, 0.3
    merged = torch.stack(
        [apply_method("dare_linear", deltas, WEIGHTS, {"density": density}, seed=seed) for seed in range(seeds)]
    )
    expected = apply_method("task_arithmetic", deltas, WEIGHTS)
    variances = [weight**2 * delta.square() for weight, delta in zip(WEIGHTS, deltas, strict=True)]
    deviation = torch.stack(variances).sum(dim=0).mul((1 - density) / density / seeds).sqrt()
    scores = (merged.mean(dim=0) - expected) / deviation
    assert scores.abs().max() < 5
    assert 0.9 < scores.square().mean() < 1.1


def test_the_share_kept_is_the_density() -> None:
    delta = torch.ones(100_000)
    merged = apply_method("dare_linear", [delta], params={"density": 0.1})
    assert merged.unique().tolist() == [0, 10]
    assert abs(merged.count_nonzero().item() - 10_000) < 5 * 90**0.5 * 10


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_independent(method: str) -> None:
    """Between sources, tensors and seeds, and the same in every run."""
    ones = torch.ones(10_000)
    params = {"density": 0.5, "rescale": "none"}

    def mask(source: int, name: str, seed: int) -> torch.Tensor:
        weights = [float(i == source) for i in range(2)]
        return apply_method(method, [ones, ones], weights, params, name=name, seed=seed) != 0

    first = mask(0, "a", 0)
    assert torch.equal(first, mask(0, "a", 0))
    for other in (mask(1, "a", 0), mask(0, "b", 0), mask(0, "a", 1)):
        assert 0.47 < (first == other).float().mean() < 0.53


@pytest.mark.parametrize("method", METHODS)
def test_masks_do_not_depend_on_the_other_tensors_or_on_the_cut(method: str) -> None:
    sources = [{"a": torch.randn(300), "b": torch.randn(17, 31)} for _ in range(2)]
    together = merge_tensors(method, sources, seed=3, block=50)
    alone = merge_tensors(method, [{"b": source["b"]} for source in sources], seed=3)
    assert torch.equal(together["b"], alone["b"])


def test_density_one_is_task_arithmetic() -> None:
    deltas = draw()
    for rescale in ("density", "l1", "none"):
        merged = apply_method("dare_linear", deltas, WEIGHTS, {"density": 1, "rescale": rescale})
        torch.testing.assert_close(merged, apply_method("task_arithmetic", deltas, WEIGHTS))


def test_density_one_is_ties_without_trimming() -> None:
    deltas = draw()
    merged = apply_method("dare_ties", deltas, WEIGHTS, {"density": 1})
    assert torch.equal(merged, apply_method("ties", deltas, WEIGHTS, {"density": 1}))


@pytest.mark.parametrize("method", METHODS)
def test_density_zero_is_the_base(method: str) -> None:
    for rescale in ("density", "l1", "none"):
        merged = apply_method(method, draw(), params={"density": 0, "rescale": rescale})
        assert merged.count_nonzero() == 0


def test_l1_keeps_the_norm_of_each_tensor() -> None:
    delta = draw(count=1)[0]
    merged = apply_method("dare_linear", [delta], params={"density": 0.2, "rescale": "l1"})
    assert merged.abs().sum().item() == pytest.approx(delta.abs().sum().item())
    assert merged.count_nonzero() < 0.3 * delta.numel()


def test_nan_spreads_no_further_than_the_rescaling() -> None:
    """Where non-finite sources are let through, they show; they are not an error of the method's own."""
    broken = torch.ones(50)
    broken[7] = float("nan")
    for rescale, affected in (("none", 1), ("density", 1), ("l1", 50)):
        merged = apply_method("dare_linear", [broken], params={"density": 0.9, "rescale": rescale})
        assert merged.isnan().sum() == affected


def test_normalised_weights() -> None:
    deltas = draw()
    merged = apply_method("dare_linear", deltas, [1.0, 2.0, 5.0], {"normalize": True})
    torch.testing.assert_close(merged, apply_method("dare_linear", deltas, [0.125, 0.25, 0.625]))
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method("dare_linear", deltas, [1.0, 1.0, -2.0], {"normalize": True})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [{"density": -0.1}, {"density": 1.1}, {"rescale": True}, {"rescale": "L1"}])
def test_parameters_out_of_range(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        apply_method(method, draw(), params=params)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_finite(method: str) -> None:
    with pytest.raises(UsageError, match="a weight is nan"):
        apply_method(method, draw(), [1.0, 1.0, float("nan")])
