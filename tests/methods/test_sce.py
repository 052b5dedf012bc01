"""``sce`` against numpy, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.methods import find_method
from mergekit_px.testing import apply_method, check_method


def draw(size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * (1 + i) * torch.randn(25, 40, generator=generator, dtype=torch.float64) for i in range(3)]


def dense(deltas: list[torch.Tensor], select: float, scale: float = 1.0, tie: float = 0.0) -> np.ndarray:
    stacked = np.stack([delta.numpy() for delta in deltas])
    variance = stacked.var(axis=0)
    kept = max(int(select * variance.size), 1) if select else 0
    threshold = np.sort(variance, axis=None)[variance.size - kept] if kept else np.inf
    stacked = stacked * (variance >= threshold)
    energy = (stacked**2).sum(axis=(1, 2))
    weights = (energy / energy.sum() if energy.sum() else energy).reshape(3, 1, 1)
    elected = np.sign(stacked.sum(axis=0))
    elected[elected == 0] = tie
    agreeing = (np.sign(stacked) == elected) & (stacked != 0)
    divisor = (weights * agreeing).sum(axis=0)
    return scale * (weights * stacked * agreeing).sum(axis=0) / np.where(divisor == 0, 1, divisor)


def test_conformance() -> None:
    check_method("sce", symmetric=True)
    check_method("sce", {"select": 1.0}, identity=True, symmetric=True)
    check_method("sce", {"select": 0.0})
    check_method("sce", {**find_method("sce").presets["mergekit"], "scale": 0.5}, symmetric=True)


@pytest.mark.parametrize("select", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_formula(select: float, size: float) -> None:
    """The energies have no absolute floor: small task vectors are weighted like large ones."""
    deltas = draw(size)
    merged = apply_method("sce", deltas, params={"select": select, "scale": -0.7})
    np.testing.assert_allclose(merged.numpy(), dense(deltas, select, -0.7), rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(("tie", "sign"), [("zero", 0.0), ("positive", 1.0)])
def test_quantised_task_vectors(tie: str, sign: float) -> None:
    """Equal variances and votes that cancel, on exact multiples of one unit."""
    generator = torch.Generator().manual_seed(1)
    deltas = [torch.randint(-3, 4, (30, 30), generator=generator).float() for _ in range(3)]
    merged = apply_method("sce", deltas, params={"select": 0.25, "tie": tie})
    exact = np.stack([delta.numpy().astype(int) for delta in deltas])
    spread = 3 * (exact**2).sum(axis=0) - exact.sum(axis=0) ** 2
    kept = spread >= np.sort(spread, axis=None)[900 - 225]
    chosen = [torch.from_numpy((delta * kept).astype(np.float64)) for delta in exact]
    np.testing.assert_allclose(merged.numpy(), dense(chosen, 1.0, tie=sign), rtol=1e-5, atol=1e-6)


def test_selecting_nothing_is_the_base() -> None:
    assert apply_method("sce", draw(), params={"select": 0}).count_nonzero() == 0


def test_equal_task_vectors_do_not_vary_and_all_stay() -> None:
    delta = draw()[0]
    torch.testing.assert_close(apply_method("sce", [delta, delta], params={"select": 0.1}), delta)


def test_it_takes_two_sources_or_more() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        apply_method("sce", [torch.ones(2)])
