"""``breadcrumbs`` and ``breadcrumbs_ties`` against numpy, and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.methods import find_method
from mergekit_px.testing import apply_method, check_method

WEIGHTS = [0.5, 0.3, -0.2]
METHODS = ["breadcrumbs", "breadcrumbs_ties"]


def draw() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1 + i) * torch.randn(25, 40, generator=generator, dtype=torch.float64) for i in range(3)]


def masked(delta: np.ndarray, density: float, gamma: float, rescale: str) -> np.ndarray:
    """By sorting; no magnitudes are equal here."""
    order = np.argsort(-np.abs(delta), axis=None)
    kept = max(int(density * delta.size), 1) if density else 0
    dropped = min(int(gamma * delta.size), delta.size - kept)
    thin = np.zeros(delta.size)
    chosen = order[dropped : dropped + kept]
    thin[chosen] = delta.reshape(-1)[chosen]
    if rescale == "l1" and kept:
        thin *= np.abs(delta).sum() / np.abs(thin).sum()
    return thin.reshape(delta.shape)


def thinned(deltas: list[torch.Tensor], density: Any, gamma: Any, rescale: str) -> np.ndarray:
    spread = [value if isinstance(value, list) else [value] * 3 for value in (density, gamma)]
    return np.stack([masked(d.numpy(), p, g, rescale) for d, p, g in zip(deltas, *spread, strict=True)])


@pytest.mark.parametrize("method", METHODS)
def test_conformance(method: str) -> None:
    check_method(method, symmetric=True)
    check_method(method, {"density": [0.1, 0.5, 1.0], "gamma": [0.2, 0.0, 0.1]}, weights=WEIGHTS, symmetric=True)
    check_method(method, {"density": 0.0, "rescale": "l1"}, weights=WEIGHTS)
    preset = find_method(method).presets["mergekit"]
    check_method(method, {**preset, "density": 0.7, "rescale": "l1"}, weights=WEIGHTS, symmetric=True)


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.1, 0.01), (0.5, 0.2), (0.9, 0.5), (1.0, 0.3), ([0.0, 0.3, 0.6], [0.1, 0.0, 0.4])]
)
def test_breadcrumbs_formula(density: Any, gamma: Any, rescale: str) -> None:
    deltas = draw()
    params = {"density": density, "gamma": gamma, "rescale": rescale, "scale": 0.7}
    expected = 0.7 * np.einsum("i,i...->...", np.array(WEIGHTS), thinned(deltas, density, gamma, rescale))
    np.testing.assert_allclose(
        apply_method("breadcrumbs", deltas, WEIGHTS, params).numpy(), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.01), (0.5, 0.2), ([0.0, 0.3, 0.6], [0.1, 0.0, 0.4])])
def test_breadcrumbs_ties_formula(density: Any, gamma: Any, rescale: str) -> None:
    deltas = draw()
    params = {"density": density, "gamma": gamma, "rescale": rescale, "divide_by": "nothing"}
    weighted = np.array(WEIGHTS).reshape(3, 1, 1) * thinned(deltas, density, gamma, rescale)
    expected = (weighted * (np.sign(weighted) == np.sign(weighted.sum(axis=0)))).sum(axis=0)
    np.testing.assert_allclose(
        apply_method("breadcrumbs_ties", deltas, WEIGHTS, params).numpy(), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_ten_elements_by_hand(method: str) -> None:
    delta = torch.tensor([10.0, -9.0, 8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0])
    merged = apply_method(method, [delta], params={"density": 0.3, "gamma": 0.2})
    assert merged.tolist() == [0, 0, 8, -7, 6, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_what_ties_with_a_kept_element_is_kept(method: str) -> None:
    delta = torch.tensor([3.0, 2.0, -2.0, 2.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0])
    merged = apply_method(method, [delta], params={"density": 0.4, "gamma": 0.2})
    assert merged.tolist() == [0, 2, -2, 2, 1, 1, -1, 0, 0, 0]
    constant = torch.full((10,), -0.5)
    assert torch.equal(apply_method(method, [constant], params={"density": 0.3, "gamma": 0.3}), constant)


def test_without_outliers_it_is_the_trimming_of_ties() -> None:
    deltas = draw()
    params = {"density": 0.3}
    merged = apply_method("breadcrumbs_ties", deltas, WEIGHTS, {**params, "gamma": 0})
    torch.testing.assert_close(merged, apply_method("ties", deltas, WEIGHTS, params))


def test_density_one_is_task_arithmetic() -> None:
    deltas = draw()
    merged = apply_method("breadcrumbs", deltas, WEIGHTS, {"density": 1, "scale": 0.3})
    torch.testing.assert_close(merged, apply_method("task_arithmetic", deltas, WEIGHTS, {"scale": 0.3}))


@pytest.mark.parametrize("params", [{"density": 1.2}, {"gamma": -0.1}, {"rescale": "density"}])
def test_parameters_out_of_range(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        apply_method("breadcrumbs", draw(), params=params)


def test_values_for_another_number_of_sources() -> None:
    with pytest.raises(UsageError, match="2 values were given for 3 sources"):
        apply_method("breadcrumbs", draw(), params={"gamma": [0.1, 0.2]})
