"""``ram`` and ``ram_plus`` against numpy, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.testing import apply_method, check_method, merge_tensors


def draw(shape: tuple[int, ...] = (20, 30), count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Sparse task vectors."""
    generator = torch.Generator().manual_seed(seed)

    def sparse() -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values * (torch.rand(shape, generator=generator) < 0.4)

    return [sparse() for _ in range(count)]


def overlap(deltas: list[np.ndarray], threshold: float) -> list[tuple[int, int]]:
    changed = [np.abs(delta) > threshold for delta in deltas]
    count = np.sum(changed, axis=0)
    return [(int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())) for mask in changed]


def dense(deltas: list[np.ndarray], threshold: float, factors: list[float]) -> np.ndarray:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        active = [source for source, delta in enumerate(deltas) if abs(delta[place]) > threshold]
        if len(active) == 1:
            merged[place] = factors[active[0]] * deltas[active[0]][place]
        elif active:
            merged[place] = np.mean([deltas[source][place] for source in active])
    return merged


def test_conformance() -> None:
    check_method("ram", {"threshold": 0.0}, identity=True, symmetric=True)
    check_method("ram", {"threshold": 0.002, "scale": 0.5}, symmetric=True)
    check_method("ram_plus", {"threshold": 0.0}, identity=True, symmetric=True)
    check_method("ram_plus", {"growth": 3.0, "clip": 10.0, "threshold": 0.002}, symmetric=True)


@pytest.mark.parametrize("threshold", [1e-5, 0.5])
def test_formula(threshold: float) -> None:
    deltas = draw()
    merged = apply_method("ram", deltas, params={"threshold": threshold, "scale": -0.5})
    expected = -0.5 * dense([delta.numpy() for delta in deltas], threshold, [1.0] * 3)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("growth", "clip"), [(0.1, 0.2), (0.3, 10.0), (0.0, 1.0)])
def test_strengthened_by_the_overlap_in_the_model_or_in_each_tensor(growth: float, clip: float) -> None:
    models = [dict(zip("ab", pair, strict=True)) for pair in zip(draw(), draw((7,), seed=5), strict=True)]
    params = {"growth": growth, "clip": clip}

    def factors(counts: list[tuple[int, int]]) -> list[float]:
        return [1 + growth * min(shared / alone if alone else 0, clip) for shared, alone in counts]

    counts = {name: overlap([model[name].numpy() for model in models], 1e-5) for name in "ab"}
    whole = [tuple(np.add(*pair)) for pair in zip(counts["a"], counts["b"], strict=True)]
    for scope in ("model", "tensor"):
        merged = merge_tensors("ram_plus", models, params={**params, "overlap_scope": scope})
        for name in "ab":
            chosen = factors(whole if scope == "model" else counts[name])
            expected = dense([model[name].numpy() for model in models], 1e-5, chosen)
            np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12)


def test_one_source_is_itself() -> None:
    delta = draw(count=1)[0]
    assert torch.equal(apply_method("ram", [delta]), delta)
    assert torch.equal(apply_method("ram_plus", [delta]), delta)


def test_bounds() -> None:
    for params in ({"threshold": -1e-5}, {"growth": -1.0}, {"clip": -1.0}):
        with pytest.raises(ValidationError):
            apply_method("ram_plus", draw(), params=params)
