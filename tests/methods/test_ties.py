"""``ties`` against numpy, against PEFT, and its limits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.methods import find_method
from mergekit_px.testing import apply_method, check_method, merge_tensors

WEIGHTS = [0.5, 0.3, 0.2]


def draw(shape: tuple[int, ...] = (40, 50), count: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, [base + (1 + i) * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(count)]


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """The k largest magnitudes and what ties with the k-th."""
    kept = max(int(density * delta.size), 1) if density > 0 else 0
    if kept == 0:
        return np.zeros_like(delta)
    threshold = np.sort(np.abs(delta), axis=None)[delta.size - kept]
    return np.where(np.abs(delta) >= threshold, delta, 0)


def dense(
    deltas: list[np.ndarray],
    weights: list[float],
    *,
    density: float | list[float] = 0.2,
    scale: float = 1.0,
    vote: str = "sum",
    weighted_vote: bool = True,
    tie: str = "zero",
    divide_by: str = "weights",
    rescale: str = "none",
) -> np.ndarray:
    densities = density if isinstance(density, list) else [density] * len(deltas)
    thin = np.stack([trimmed(delta, share) for delta, share in zip(deltas, densities, strict=True)])
    if rescale == "l1":
        for row, delta in zip(thin, deltas, strict=True):
            row *= np.abs(delta).sum() / np.abs(row).sum()
    column = np.array(weights).reshape(-1, *[1] * deltas[0].ndim)
    weighted = thin * column
    ballots = weighted if weighted_vote else thin
    elected = np.sign((np.sign(ballots) if vote == "count" else ballots).sum(axis=0))
    if tie == "positive":
        elected[elected == 0] = 1
    agreeing = (np.sign(ballots) == elected) & (ballots != 0)
    total = (weighted * agreeing).sum(axis=0)
    divisor = {"weights": column * agreeing, "count": agreeing, "nothing": 0 * agreeing}[divide_by].sum(axis=0)
    return scale * total / np.where(divisor == 0, 1, divisor)


def expect(params: dict[str, Any], weights: list[float] = WEIGHTS) -> None:
    base, sources = draw()
    merged = apply_method("ties", sources, weights, params, base=base)
    options = {name: value for name, value in params.items() if name != "trim_scope"}
    expected = base.numpy() + dense([(s - base).numpy() for s in sources], weights, **options)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_conformance() -> None:
    check_method("ties", symmetric=True)
    check_method("ties", {"density": 1.0}, symmetric=True, identity=True)
    check_method("ties", {"density": 0.0}, weights=WEIGHTS)
    check_method("ties", {"density": [0.1, 0.5, 1.0]}, weights=WEIGHTS, symmetric=True)
    check_method("ties", {"rescale": "l1", "trim_scope": "tensor"}, weights=[0.5, 0.3, -0.2], symmetric=True)
    for preset in ("mergekit", "peft"):
        check_method("ties", {**find_method("ties").presets[preset], "density": 0.4}, weights=WEIGHTS, symmetric=True)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"density": 0.5},
        {"density": 1.0},
        {"density": [0.1, 0.4, 1.0]},
        {"density": [0.0, 0.4, 0.2]},
        {"scale": -1.7},
        {"vote": "count"},
        {"weighted_vote": False},
        {"weighted_vote": False, "divide_by": "count", "vote": "count"},
        {"divide_by": "count"},
        {"divide_by": "nothing"},
        {"tie": "positive", "vote": "count", "density": 0.5},
        {"rescale": "l1"},
        {"rescale": "l1", "density": [0.1, 0.4, 1.0], "weighted_vote": False},
    ],
    ids=repr,
)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [0.7, -0.4, 0.2]], ids=repr)
def test_formula(params: dict[str, Any], weights: list[float]) -> None:
    expect(params, weights)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.lists(st.floats(0.1, 3), min_size=3, max_size=3))
def test_any_density_and_weights(density: float, weights: list[float]) -> None:
    expect({"density": density}, weights)


def peft_merge_functions() -> ModuleType:
    """Only PEFT's file of merge functions: importing the package takes seconds."""
    package = importlib.util.find_spec("peft")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("peft_merge_functions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_the_peft_preset_is_peft(density: float, vote: str) -> None:
    base, sources = draw((30, 41), count=4)
    weights = [0.7, 0.4, 1.0, 0.2]
    expected = peft_merge_functions().ties([s - base for s in sources], torch.tensor(weights).double(), density, vote)
    params = {**find_method("ties").presets["peft"], "density": density, "vote": {"total": "sum"}.get(vote, "count")}
    merged = apply_method("ties", [s - base for s in sources], weights, params)
    torch.testing.assert_close(merged, expected)


def test_presets_differ_from_the_paper_as_documented() -> None:
    presets = find_method("ties").presets
    defaults = find_method("ties").params()
    assert defaults.model_dump() == {
        "scale": 1.0,
        "vote": "sum",
        "weighted_vote": True,
        "tie": "zero",
        "divide_by": "weights",
        "density": 0.2,
        "trim_scope": "model",
        "rescale": "none",
    }
    assert presets == {
        "mergekit": {"density": 1.0, "trim_scope": "tensor", "tie": "positive"},
        "peft": {"trim_scope": "tensor", "tie": "positive", "weighted_vote": False, "divide_by": "count"},
    }


def test_elements_that_tie_with_the_threshold_all_stay() -> None:
    delta = torch.tensor([4.0, -2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert apply_method("ties", [delta], params={"density": 0.2}).tolist() == [4, -2, 2, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.19, 1), (0.2, 2), (0.29, 2), (1.0, 10)])
def test_the_number_kept_is_rounded_down_but_not_to_none(density: float, kept: int) -> None:
    delta = torch.arange(1.0, 11.0)
    assert apply_method("ties", [delta], params={"density": density}).count_nonzero() == kept


def test_votes_that_cancel_give_zero_or_the_positive_value() -> None:
    deltas = [torch.tensor([3.0, -3.0]), torch.tensor([-3.0, 3.0])]
    assert apply_method("ties", deltas, params={"density": 1}).tolist() == [0, 0]
    assert apply_method("ties", deltas, params={"density": 1, "tie": "positive"}).tolist() == [3, 3]


def test_votes_of_decimal_weights_cancel_too() -> None:
    """0.6 * 2 - 0.4 * 3 is not zero in floating point."""
    unit = 2.0**-13
    deltas = [torch.tensor([2 * unit, 2 * unit]), torch.tensor([-3 * unit, -4 * unit])]
    merged = apply_method("ties", deltas, [0.6, 0.4], {"density": 1})
    torch.testing.assert_close(merged, torch.tensor([0.0, -4 * unit]))


def test_the_paper_trims_all_tensors_of_a_model_together() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {"large": torch.randn(50, 20, generator=generator), "small": 0.01 * torch.randn(500, generator=generator)}
    together = np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors.values()])
    expected = trimmed(together, 0.3)
    merged = merge_tensors("ties", [tensors], params={"density": 0.3}, block=128)
    np.testing.assert_array_equal(np.concatenate([m.numpy().reshape(-1) for m in merged.values()]), expected)
    assert merged["small"].count_nonzero() == 0
    alone = merge_tensors("ties", [tensors], params={"density": 0.3, "trim_scope": "tensor"}, block=128)
    assert {name: int(tensor.count_nonzero()) for name, tensor in alone.items()} == {"large": 300, "small": 150}


def test_a_model_of_float32_and_float64_tensors_is_trimmed_together() -> None:
    generator = torch.Generator().manual_seed(4)
    single = torch.randn(400, generator=generator)
    tensors = {"single": single, "double": single.double() * (1 + 1e-10)}
    together = np.concatenate([tensor.double().numpy() for tensor in tensors.values()])
    for density in (0.2, 0.50125):
        merged = merge_tensors("ties", [tensors], params={"density": density})
        values = np.concatenate([tensor.double().numpy() for tensor in merged.values()])
        np.testing.assert_array_equal(values, trimmed(together, density))


def test_mergekits_variant_of_quantised_deltas() -> None:
    """Ties at the threshold and in the votes: the definition on exact multiples of one unit."""
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randint(-4, 5, (4000,), generator=generator).double() for _ in range(3)]
    params = {**find_method("ties").presets["mergekit"], "density": 0.6}
    merged = apply_method("ties", deltas, [1.0, 2.0, 3.0], params)
    expected = dense([d.numpy() for d in deltas], [1.0, 2.0, 3.0], density=0.6, tie="positive")
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-12)


def test_density_one_is_the_mean_where_signs_agree() -> None:
    base, sources = draw()
    up = [base + (source - base).abs() for source in sources]
    merged = apply_method("ties", up, params={"density": 1}, base=base)
    torch.testing.assert_close(merged, apply_method("linear", up))


def test_scale_zero_is_the_base() -> None:
    base, sources = draw()
    assert torch.equal(apply_method("ties", sources, params={"scale": 0}, base=base), base)


@given(st.floats(0.5, 20))
@settings(deadline=None, max_examples=20)
def test_a_common_factor_of_the_weights_does_not_matter(factor: float) -> None:
    base, sources = draw()
    merged = apply_method("ties", sources, [w * factor for w in WEIGHTS], base=base)
    torch.testing.assert_close(merged, apply_method("ties", sources, WEIGHTS, base=base))


def test_opposite_task_vectors_give_the_opposite() -> None:
    _, deltas = draw()
    merged = apply_method("ties", deltas, WEIGHTS)
    assert torch.equal(apply_method("ties", [-delta for delta in deltas], WEIGHTS), -merged)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan"), [0.5, 2.0, 0.5]])
def test_density_is_a_share(density: Any) -> None:
    base, sources = draw()
    with pytest.raises(ValidationError):
        apply_method("ties", sources, params={"density": density}, base=base)


def test_one_density_for_each_source() -> None:
    base, sources = draw()
    with pytest.raises(UsageError, match="2 values were given for 3 sources"):
        apply_method("ties", sources, params={"density": [0.5, 0.2]}, base=base)


def test_weights_are_finite() -> None:
    base, sources = draw()
    with pytest.raises(UsageError, match="a weight is inf"):
        apply_method("ties", sources, [1.0, 1.0, float("inf")], base=base)
