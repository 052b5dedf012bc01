"""``slerp`` against numpy, and its geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(shape: tuple[int, ...] = (6, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), 2 * torch.randn(shape, generator=generator) + 0.3


def at_angle(angle: float, norm: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of 64 elements and the given norms, 1 and ``norm``, at the given angle."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 2)))[0].T
    first, second = basis[0], norm * (np.cos(angle) * basis[0] + np.sin(angle) * basis[1])
    return torch.from_numpy(first), torch.from_numpy(second)


def dense(first: torch.Tensor, second: torch.Tensor, t: float) -> np.ndarray:
    x, y = first.numpy().astype(np.float64), second.numpy().astype(np.float64)
    cosine = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def test_conformance() -> None:
    check_method("slerp", identity=True, symmetric=True)
    check_method("slerp", {"t": 0.3}, identity=True)
    check_method("slerp", {"t": 0}, identity=True)


@given(st.floats(0, 1))
def test_formula(t: float) -> None:
    first, second = draw()
    merged = apply_method("slerp", [first, second], params={"t": t})
    np.testing.assert_allclose(merged.numpy(), dense(first, second, t), rtol=1e-5, atol=1e-6)


@given(st.floats(0, 1), st.floats(0.04, 3.1), st.floats(0.5, 4))
def test_angles_of_all_sizes(t: float, angle: float, norm: float) -> None:
    first, second = at_angle(angle, norm)
    merged = apply_method("slerp", [first, second], params={"t": t})
    np.testing.assert_allclose(merged.numpy(), dense(first, second, t), rtol=1e-9, atol=1e-9)


@given(st.floats(0, 1), st.floats(0.04, 3.1))
def test_unit_tensors_stay_on_the_sphere_and_divide_the_angle(t: float, angle: float) -> None:
    first, second = at_angle(angle)
    merged = apply_method("slerp", [first, second], params={"t": t})
    assert torch.linalg.vector_norm(merged).item() == pytest.approx(1)
    assert torch.dot(first, merged).clamp(-1, 1).acos().item() == pytest.approx(t * angle, abs=1e-6)


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_are_the_sources(end: int) -> None:
    sources = draw()
    assert torch.equal(apply_method("slerp", sources, params={"t": end}), sources[end])


@given(st.floats(0, 1))
def test_exchanging_the_ends_turns_the_position_round(t: float) -> None:
    first, second = draw()
    there = apply_method("slerp", [first, second], params={"t": t})
    back = apply_method("slerp", [second, first], params={"t": 1 - t})
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)


def straight(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    return (1 - t) * first + t * second


@pytest.mark.parametrize("angle", [0.0, 0.0316, np.pi, np.pi - 0.0316])
def test_nearly_parallel_and_antiparallel_tensors_go_straight(angle: float) -> None:
    first, second = at_angle(angle, 1.5)
    merged = apply_method("slerp", [first, second], params={"t": 0.3})
    torch.testing.assert_close(merged, straight(first, second, 0.3))


@pytest.mark.parametrize("angle", [0.0317, np.pi - 0.0317])
def test_the_arc_begins_at_a_cosine_of_0_9995(angle: float) -> None:
    first, second = at_angle(angle, 1.5)
    merged = apply_method("slerp", [first, second], params={"t": 0.3})
    assert not torch.allclose(merged, straight(first, second, 0.3), rtol=1e-9, atol=1e-12)


def test_zero_tensors_go_straight() -> None:
    first, zero = draw()[0], torch.zeros(6, 7)
    torch.testing.assert_close(apply_method("slerp", [first, zero], params={"t": 0.25}), 0.75 * first)
    assert torch.equal(apply_method("slerp", [zero, zero]), zero)


def test_tiny_and_huge_tensors_have_an_angle() -> None:
    first, second = draw()
    for factor in (1e-30, 1e30):
        merged = apply_method("slerp", [first * factor, second * factor], params={"t": 0.4}) / factor
        np.testing.assert_allclose(merged.numpy(), dense(first, second, 0.4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_the_position_is_between_the_ends(t: float) -> None:
    with pytest.raises(ValidationError):
        apply_method("slerp", draw(), params={"t": t})


@pytest.mark.parametrize("count", [1, 3])
def test_it_takes_two_sources(count: int) -> None:
    with pytest.raises(UsageError, match="exactly 2"):
        apply_method("slerp", [torch.ones(2)] * count)


def test_non_finite_sources_are_not_hidden() -> None:
    first, second = draw()
    first[0, 0] = float("nan")
    merged = apply_method("slerp", [first, second])
    assert merged[0, 0].isnan()
