"""Polar factors, against the float64 decomposition of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import NonFiniteError, UsageError
from mergekit_px.kernels.polar import STACK_FLOOR, polar_factor

MODES = ("svd", "gram64", "newton_schulz")


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def reference(matrix: torch.Tensor, floor: float = 0.0) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    kept = s > floor
    return u[:, kept] @ vh[kept]


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("shape", [(400, 150), (150, 400), (64, 64), (420, 400), (5, 1), (1, 5), (1, 1)])
def test_factor_of_a_full_rank_matrix(mode: str, shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    polar = polar_factor(matrix, mode=mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(polar.factor.numpy(), reference(matrix), atol=2e-5)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert polar.rank == min(shape)
    assert polar.nuclear_norm == pytest.approx(values.sum(), rel=1e-5)
    assert polar.mean_value == pytest.approx(values.mean(), rel=1e-5)
    assert polar.error < 5e-5
    assert (polar.steps > 0) == (polar.mode == "newton_schulz" and min(shape) > 1)
    assert polar.notes == ()


@pytest.mark.parametrize("mode", MODES)
def test_factor_of_a_factor_is_itself(mode: str) -> None:
    factor = polar_factor(noise(200, 80), mode=mode).factor  # type: ignore[arg-type]
    again = polar_factor(factor, mode=mode).factor  # type: ignore[arg-type]
    assert float((again - factor).abs().max()) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_scale_does_not_matter(mode: str) -> None:
    matrix = noise(120, 60)
    expected = polar_factor(matrix, mode=mode).factor  # type: ignore[arg-type]
    for scale in (1e-12, 1e12):
        scaled = polar_factor(matrix * scale, mode=mode).factor  # type: ignore[arg-type]
        assert float((scaled - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_rank_deficient_matrix_gives_a_partial_isometry(mode: str) -> None:
    half = noise(300, 40)
    matrix = torch.cat([half, half], dim=1)
    polar = polar_factor(matrix, mode=mode)  # type: ignore[arg-type]
    assert polar.rank == 40
    np.testing.assert_allclose(polar.factor.numpy(), reference(matrix, 1e-3), atol=1e-5)
    assert polar.error < 1e-5
    if mode == "newton_schulz":
        assert polar.mode == "gram64"
        assert "did not converge" in polar.notes[0] and "rank 40 of 80" in polar.notes[0]


@pytest.mark.parametrize("mode", ["svd", "gram64"])
def test_floors_leave_out_small_directions(mode: str) -> None:
    u, _ = torch.linalg.qr(noise(60, 4))
    v, _ = torch.linalg.qr(noise(50, 4, seed=1))
    matrix = (u * torch.tensor([1.0, 0.5, 1e-2, 1e-5])) @ v.T
    assert polar_factor(matrix, mode=mode).rank == 4  # type: ignore[arg-type]
    assert polar_factor(matrix, mode=mode, relative_floor=STACK_FLOOR).rank == 3  # type: ignore[arg-type]
    above = polar_factor(matrix, mode=mode, floor=0.02)  # type: ignore[arg-type]
    assert above.rank == 2
    assert above.nuclear_norm == pytest.approx(1.5, rel=1e-5)
    np.testing.assert_allclose(above.factor.numpy(), (u[:, :2] @ v[:, :2].T).numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0)])
def test_zero_matrix(shape: tuple[int, int]) -> None:
    polar = polar_factor(torch.zeros(shape))
    assert polar.rank == 0
    assert polar.mean_value == 0.0
    assert torch.equal(polar.factor, torch.zeros(shape))


def test_dtype_is_kept_and_float64_is_exact() -> None:
    matrix = noise(90, 40).double()
    for mode in ("svd", "newton_schulz", "auto"):
        polar = polar_factor(matrix, mode=mode)  # type: ignore[arg-type]
        assert polar.factor.dtype == torch.float64
        np.testing.assert_allclose(polar.factor.numpy(), reference(matrix), atol=1e-9)
    assert polar_factor(matrix.bfloat16()).factor.dtype == torch.float32


def test_bad_input() -> None:
    matrix = noise(5, 4)
    matrix[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^w: the matrix holds a NaN"):
        polar_factor(matrix, label="w")
    with pytest.raises(UsageError, match="needs a matrix"):
        polar_factor(torch.ones(3))


def test_a_failing_eigensolver_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = noise(90, 40)
    expected = reference(matrix)

    def broken(*_: object) -> object:
        raise torch.linalg.LinAlgError("linalg.eigh: failed")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    polar = polar_factor(matrix, mode="gram64")
    assert polar.mode == "svd"
    assert polar.notes[0] == "polar factor (gram64) failed, served by svd"
    np.testing.assert_allclose(polar.factor.numpy(), expected, atol=1e-5)


def test_input_is_not_changed() -> None:
    for mode in MODES:
        matrix = noise(30, 20).double()
        before = matrix.clone()
        polar_factor(matrix, mode=mode).factor.mul_(0)  # type: ignore[arg-type]
        assert torch.equal(matrix, before)


def graded(m: int, n: int, decades: float) -> torch.Tensor:
    left, right = (torch.linalg.qr(noise(rows, n, seed).double())[0] for seed, rows in enumerate((m, n)))
    return ((left * torch.logspace(0, -decades, n, dtype=torch.float64)) @ right.T).float()


@pytest.mark.parametrize("matrix", [noise(500, 500), noise(1300, 450), graded(600, 400, 3), graded(500, 420, 4)])
def test_float32_eigenvectors_give_the_factor_of_a_float32_decomposition(matrix: torch.Tensor) -> None:
    polar = polar_factor(matrix, mode="gram")
    exact = reference(matrix)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    dense = np.linalg.norm((u @ vh).numpy() - exact)
    # Directions whose singular value is near the rounding of the matrix are as uncertain in either.
    assert np.linalg.norm(polar.factor.numpy() - exact) < max(5 * dense, 2e-5 * np.linalg.norm(exact))
    assert polar.mode in ("gram", "svd") and polar.notes == ()
    assert polar.error < 1e-5
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert polar.nuclear_norm == pytest.approx(values.sum(), rel=1e-5)


def test_float32_eigenvectors_respect_floors() -> None:
    matrix = graded(500, 400, 3)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    floor = float(values[149] + values[150]) / 2
    polar = polar_factor(matrix, mode="gram", floor=floor)
    assert polar.rank == 150
    np.testing.assert_allclose(polar.factor.numpy(), reference(matrix, floor), atol=1e-4)


def test_float32_eigenvectors_of_a_rank_deficient_matrix() -> None:
    half = noise(900, 220)
    matrix = torch.cat([half, half], dim=1)
    polar = polar_factor(matrix, mode="gram")
    assert polar.rank == 220
    np.testing.assert_allclose(polar.factor.numpy(), reference(matrix, 1e-3), atol=1e-5)
