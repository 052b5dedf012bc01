"""``della`` and ``della_linear`` against numpy on the same numbers, their expectation and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.kernels.random import RandomStream
from mergekit_px.testing import apply_method, check_method

WEIGHTS = [0.5, 0.3, -0.2]
METHODS = ["della_linear", "della"]


def draw(shape: tuple[int, ...] = (30, 40), count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1 + i) * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(count)]


def probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    ranks = np.abs(delta).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return (density - epsilon) + 2 * epsilon * ranks / (delta.shape[-1] - 1)


def thinned(deltas: list[torch.Tensor], densities: list[float], epsilon: float, rescale: str) -> np.ndarray:
    stream = RandomStream(4, "t", 0, deltas[0].numel())
    thin = []
    for source, (delta, density) in enumerate(zip(deltas, densities, strict=True)):
        values = delta.numpy()
        if density in (0, 1):
            thin.append(values * density)
            continue
        chances = probabilities(values, density, epsilon)
        kept = stream.uniform(source).numpy().reshape(values.shape) < chances
        thin.append(values * kept / (chances if rescale == "probability" else 1))
    return np.stack(thin)


@pytest.mark.parametrize("method", METHODS)
def test_conformance(method: str) -> None:
    check_method(method)
    check_method(method, {"density": [0.2, 0.5, 1.0], "rescale": "none"}, weights=WEIGHTS)
    check_method(method, {"density": 0.0}, weights=WEIGHTS)
    check_method(method, {"density": [0.2, 0.5, 1.0], "epsilon": [0.1, 0.2, 0.0], "rescale": "l1"}, weights=WEIGHTS)
    check_method(method, {"density": 0.5, "epsilon": 0.5})


@pytest.mark.parametrize("rescale", ["probability", "none"])
@pytest.mark.parametrize(("densities", "epsilon"), [([0.5] * 3, 0.15), ([0.0, 0.3, 1.0], 0.1), ([0.4] * 3, 0.0)])
def test_formulas(densities: list[float], epsilon: float, rescale: str) -> None:
    deltas = draw()
    params = {"density": densities, "epsilon": epsilon, "rescale": rescale, "scale": 0.7}
    weighted = np.array(WEIGHTS).reshape(3, 1, 1) * thinned(deltas, densities, epsilon, rescale)
    merged = apply_method("della_linear", deltas, WEIGHTS, params, seed=4)
    np.testing.assert_allclose(merged.numpy(), 0.7 * weighted.sum(axis=0), rtol=1e-5, atol=1e-6)
    agreeing = weighted * (np.sign(weighted) == np.sign(weighted.sum(axis=0)))
    merged = apply_method("della", deltas, WEIGHTS, {**params, "divide_by": "nothing"}, seed=4)
    np.testing.assert_allclose(merged.numpy(), 0.7 * agreeing.sum(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_of_each_tensor_is_kept(method: str) -> None:
    delta = draw(count=1)[0]
    params = {"density": 0.5, "epsilon": 0.3, "rescale": "l1"}
    for block in (None, 100):
        merged = apply_method(method, [delta], params=params, seed=4, block=block)
        kept = merged != 0
        assert 0.4 < kept.double().mean() < 0.6
        torch.testing.assert_close(merged.abs().sum(), delta.abs().sum())
        ratios = (merged / delta)[kept]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_a_window_for_each_source() -> None:
    deltas = draw()
    params = {"density": [0.5, 0.3, 0.6], "rescale": "probability"}
    merged = apply_method("della_linear", deltas, WEIGHTS, {**params, "epsilon": [0.1, 0.0, 0.4]}, seed=4)
    parts = [thinned(deltas, [0.5, 0.3, 0.6], epsilon, "probability")[i] for i, epsilon in enumerate((0.1, 0.0, 0.4))]
    expected = sum(weight * part for weight, part in zip(WEIGHTS, parts, strict=True))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_expectation_is_task_arithmetic() -> None:
    deltas, seeds = draw((10, 30), count=1), 400
    params = {"density": 0.4, "epsilon": 0.3}
    merged = torch.stack([apply_method("della_linear", deltas, params=params, seed=seed) for seed in range(seeds)])
    chances = torch.from_numpy(probabilities(deltas[0].numpy(), 0.4, 0.3))
    deviation = deltas[0].abs() * ((1 - chances) / chances / seeds).sqrt()
    scores = (merged.mean(dim=0) - deltas[0]) / deviation
    assert scores.abs().max() < 5
    assert 0.7 < scores.square().mean() < 1.3


def test_larger_elements_are_kept_more_often() -> None:
    delta = torch.arange(1.0, 101.0)
    kept = torch.stack(
        [
            apply_method("della_linear", [delta], params={"density": 0.5, "epsilon": 0.4}, seed=seed) != 0
            for seed in range(500)
        ]
    ).double()
    ladder = torch.linspace(0.1, 0.9, 100, dtype=torch.float64)
    assert ((kept.mean(dim=0) - ladder).abs() < 5 * (ladder * (1 - ladder) / 500).sqrt()).all()


def test_each_row_is_ranked_alone_and_a_vector_is_a_row() -> None:
    large = torch.cat([torch.full((1, 50), 1.0), torch.full((1, 50), 1000.0)])
    params = {"density": 0.5, "epsilon": 0.5, "rescale": "none"}
    kept = torch.stack([apply_method("della_linear", [large], params=params, seed=seed) for seed in range(50)]) != 0
    assert 0.4 < kept[:, 0].double().mean() < 0.6 and 0.4 < kept[:, 1].double().mean() < 0.6
    flat = torch.stack(
        [apply_method("della_linear", [large.reshape(-1)], params=params, seed=seed) for seed in range(50)]
    )
    assert (flat != 0)[:, :50].double().mean() < 0.35 < 0.65 < (flat != 0)[:, 50:].double().mean()


@pytest.mark.parametrize("method", METHODS)
def test_without_a_window_it_is_dare(method: str) -> None:
    deltas = draw()
    dare = {"della_linear": "dare_linear", "della": "dare_ties"}[method]
    merged = apply_method(method, deltas, WEIGHTS, {"density": 0.3, "epsilon": 0})
    torch.testing.assert_close(merged, apply_method(dare, deltas, WEIGHTS, {"density": 0.3}), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "params",
    [{"density": 0.9, "epsilon": 0.2}, {"density": [0.5, 0.1, 0.5]}, {"density": 1.5}, {"epsilon": -0.1}],
)
def test_the_window_stays_between_zero_and_one(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        apply_method(method, draw(), params=params)


def test_weights_that_cancel_cannot_be_normalised() -> None:
    with pytest.raises(UsageError, match="add up to zero"):
        apply_method("della_linear", draw(), [1.0, 1.0, -2.0], {"normalize": True})
