"""Truncated and thin decompositions, against numpy's float64 decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import NonFiniteError, RunError, UsageError
from mergekit_px.kernels import svd as module
from mergekit_px.kernels.svd import SVD, truncated_svd

EXACT = ("dense", "gram")
ITERATIVE = ("krylov", "randomised")


def decaying(m: int, n: int, power: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix with singular values i^-power."""
    random = np.random.default_rng(seed)
    r = min(m, n)
    u, _ = np.linalg.qr(random.standard_normal((m, r)))
    v, _ = np.linalg.qr(random.standard_normal((n, r)))
    return torch.from_numpy((u * np.arange(1, r + 1) ** -power) @ v.T).to(dtype)


def low_rank_plus_noise(m: int, n: int, rank: int, seed: int = 0) -> torch.Tensor:
    """``rank`` components of 1.5 to 4 times the edge of the noise around them."""
    random = np.random.default_rng(seed)
    u, _ = np.linalg.qr(random.standard_normal((m, rank)))
    v, _ = np.linalg.qr(random.standard_normal((n, rank)))
    signal = (u * np.linspace(4, 1.5, rank) * (m**0.5 + n**0.5)) @ v.T
    return torch.from_numpy(signal + random.standard_normal((m, n))).float()


def values_of(matrix: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


def assert_orthonormal(parts: SVD, tolerance: float = 5e-6) -> None:
    for basis in (parts.u, parts.v):
        gap = basis.double().T @ basis.double() - torch.eye(parts.rank, dtype=torch.float64)
        assert float(gap.abs().max()) < tolerance


@pytest.mark.parametrize("mode", [*EXACT, *ITERATIVE, "auto"])
@pytest.mark.parametrize("shape", [(500, 420), (420, 900)])
def test_leading_components_of_a_decaying_spectrum(mode: str, shape: tuple[int, int]) -> None:
    matrix = decaying(*shape)
    parts = truncated_svd(matrix, 24, mode=mode)  # type: ignore[arg-type]
    expected = values_of(matrix)[:24]
    assert parts.mode == {"auto": "krylov"}.get(mode, mode)
    np.testing.assert_allclose(parts.s.numpy(), expected, rtol=1e-3)
    assert parts.converged
    assert_orthonormal(parts)
    best = np.sum(expected**2) / np.sum(values_of(matrix) ** 2)
    assert parts.captured_energy == pytest.approx(best, rel=1e-4)
    assert parts.u.shape == (shape[0], 24) and parts.v.shape == (shape[1], 24)
    projected = parts.u.T @ matrix @ parts.v
    np.testing.assert_allclose(projected.diagonal().numpy(), parts.s.numpy(), rtol=1e-3)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("shape", [(430, 400), (900, 400), (400, 900), (60, 60), (7, 200)])
def test_exact_routes_restore_the_matrix(mode: str, shape: tuple[int, int]) -> None:
    matrix = decaying(*shape)
    parts = truncated_svd(matrix, mode=mode)  # type: ignore[arg-type]
    assert parts.rank == min(shape)
    assert float((parts.matrix() - matrix).norm() / matrix.norm()) < 1e-5
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix), rtol=1e-4)
    assert parts.residual < 1e-5
    assert parts.captured_energy == pytest.approx(1.0, abs=1e-6)
    assert parts.notes == ()


def test_leading_part_of_the_gram_route_keeps_float64_accuracy_of_the_values() -> None:
    matrix = decaying(800, 420)
    parts = truncated_svd(matrix, 200, mode="gram")
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix)[:200], rtol=1e-5)
    assert_orthonormal(parts)


def test_small_values_are_decomposed_in_float64_where_float32_vectors_would_lose_them() -> None:
    matrix = decaying(900, 400, power=2.0)
    parts = truncated_svd(matrix, 150, mode="gram")
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix)[:150], rtol=1e-3)


@pytest.mark.parametrize("mode", ITERATIVE)
def test_flat_tail_captures_the_energy_and_says_that_components_are_not_identifiable(mode: str) -> None:
    matrix = low_rank_plus_noise(500, 450, 12)
    parts = truncated_svd(matrix, 40, mode=mode)  # type: ignore[arg-type]
    expected = values_of(matrix)[:40]
    np.testing.assert_allclose(parts.s[:12].numpy(), expected[:12], rtol=1e-3)
    assert float(parts.s.double().square().sum()) == pytest.approx(np.sum(expected**2), rel=1e-3)
    assert parts.identifiable == 12
    assert any("components 13 to 40 are not identifiable" in note for note in parts.notes)
    assert parts.leading(12).notes == ()


def test_energy_and_residual_describe_the_result() -> None:
    matrix = low_rank_plus_noise(500, 450, 12)
    parts = truncated_svd(matrix, 20, mode="krylov")
    left = (matrix.double() - parts.matrix().double()).square().sum() / matrix.double().square().sum()
    assert parts.captured_energy + float(left) == pytest.approx(1.0, abs=1e-5)
    gaps = (matrix.T @ parts.u - parts.v * parts.s).norm(dim=0), (matrix @ parts.v - parts.u * parts.s).norm(dim=0)
    largest = max(float(gap.max()) for gap in gaps) / float(parts.s[0])
    assert 0.3 * largest < parts.residual <= 1.001 * largest


@pytest.mark.parametrize("mode", ITERATIVE)
def test_a_sketch_that_does_not_converge_falls_back_to_an_exact_route_and_says_so(mode: str) -> None:
    noise = torch.randn(400, 400, generator=torch.Generator().manual_seed(3))
    parts = truncated_svd(noise, 100, mode=mode, tolerance=1e-9)  # type: ignore[arg-type]
    assert parts.mode in EXACT
    assert not parts.converged
    assert parts.notes[0] == f"the iteration did not converge; decomposed exactly ({parts.mode})"
    np.testing.assert_allclose(parts.s.numpy(), values_of(noise)[:100], rtol=1e-4)


@pytest.mark.parametrize("mode", [*EXACT, *ITERATIVE])
def test_rank_deficient_matrices_have_as_many_components_as_their_rank(mode: str) -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(450, 9, generator=random) @ torch.randn(9, 430, generator=random)
    parts = truncated_svd(matrix, 30, mode=mode)  # type: ignore[arg-type]
    assert parts.rank == 9
    assert float((parts.matrix() - matrix).norm() / matrix.norm()) < 1e-5
    assert parts.identifiable == 9


@pytest.mark.parametrize("mode", ["auto", *EXACT, *ITERATIVE])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 3)])
def test_thin_shapes(mode: str, shape: tuple[int, int]) -> None:
    matrix = torch.arange(1.0, shape[0] * shape[1] + 1).reshape(shape) ** 2
    parts = truncated_svd(matrix, 1, mode=mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix)[:1], rtol=1e-5)


@pytest.mark.parametrize("matrix", [torch.zeros(5, 4), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(0, 0)])
def test_zero_and_empty_matrices_have_no_components(matrix: torch.Tensor) -> None:
    parts = truncated_svd(matrix, 3)
    assert parts.rank == 0
    assert parts.captured_energy == 1.0
    assert torch.equal(parts.matrix(), matrix)


def test_rank_zero_and_rank_above_the_shape() -> None:
    matrix = decaying(20, 10)
    assert truncated_svd(matrix, 0).rank == 0
    assert truncated_svd(matrix, 0).captured_energy == 0.0
    assert truncated_svd(matrix, 99).rank == 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_elements_are_named(bad: float) -> None:
    matrix = decaying(20, 10)
    matrix[3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"^layer\.weight: the matrix holds a NaN or an infinity"):
        truncated_svd(matrix, 3, label="layer.weight")


def test_misuse_is_refused() -> None:
    with pytest.raises(UsageError, match="must not be negative, got -1"):
        truncated_svd(torch.ones(3, 3), -1)
    with pytest.raises(UsageError, match=r"needs a matrix, got shape \(3,\)"):
        truncated_svd(torch.ones(3))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("mode", [*EXACT, *ITERATIVE])
def test_scale_of_the_matrix_does_not_matter(mode: str, scale: float) -> None:
    matrix = decaying(400, 390)
    plain = truncated_svd(matrix, 10, mode=mode)  # type: ignore[arg-type]
    scaled = truncated_svd(matrix * scale, 10, mode=mode)  # type: ignore[arg-type]
    np.testing.assert_allclose(scaled.s.numpy(), plain.s.numpy() * scale, rtol=1e-4)


@pytest.mark.parametrize("mode", [*EXACT, *ITERATIVE])
def test_same_bytes_on_every_run_whatever_the_global_seed(mode: str) -> None:
    matrix = low_rank_plus_noise(420, 400, 8)
    torch.manual_seed(1)
    first = truncated_svd(matrix, 12, mode=mode)  # type: ignore[arg-type]
    torch.manual_seed(2)
    drawn = torch.rand(())
    torch.manual_seed(2)
    second = truncated_svd(matrix, 12, mode=mode)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(()), drawn), "the global generator is left alone"
    for name in ("u", "s", "v"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_seed_and_label_choose_the_sketch() -> None:
    matrix = low_rank_plus_noise(420, 400, 8)
    base = truncated_svd(matrix, 40, mode="krylov")
    for options in ({"seed": 1}, {"label": "other"}):
        other = truncated_svd(matrix, 40, mode="krylov", **options)  # type: ignore[arg-type]
        assert not torch.equal(base.u, other.u)
        np.testing.assert_allclose(base.s[:8].numpy(), other.s[:8].numpy(), rtol=1e-3)


@pytest.mark.parametrize("mode", [*EXACT, *ITERATIVE])
def test_largest_entry_of_each_left_vector_is_positive(mode: str) -> None:
    for matrix in (decaying(400, 390), decaying(390, 400)):
        parts = truncated_svd(matrix, 10, mode=mode)  # type: ignore[arg-type]
        peaks = parts.u.gather(0, parts.u.abs().argmax(0, keepdim=True))
        assert bool((peaks > 0).all())


def test_float64_stays_float64_and_narrow_dtypes_are_computed_in_float32() -> None:
    matrix = decaying(400, 390, dtype=torch.float64)
    for mode in (*ITERATIVE, "dense"):
        parts = truncated_svd(matrix, 20, mode=mode, tolerance=1e-7)  # type: ignore[arg-type]
        assert parts.s.dtype == torch.float64
        np.testing.assert_allclose(parts.s.numpy(), values_of(matrix)[:20], rtol=1e-7)
    assert truncated_svd(matrix.bfloat16(), 5).u.dtype == torch.float32


def test_a_failing_driver_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(30, 20)
    whole = torch.linalg.svd
    calls = []

    def flaky(*args: object, **options: object) -> object:
        calls.append(options)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return whole(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.linalg, "svd", flaky)
    parts = truncated_svd(matrix, mode="dense")
    assert parts.fallbacks == (
        "SVD (default driver) failed: linalg.svd: the algorithm failed to converge",
        "served by float64 on the CPU",
    )
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix), rtol=1e-5)


def test_when_every_driver_fails_the_gram_matrix_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    matrix = decaying(30, 20)
    parts = truncated_svd(matrix, mode="dense")
    assert parts.mode == "gram"
    assert parts.fallbacks[-1] == "served by the Gram matrix"
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix), rtol=1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(RunError, match="no driver could decompose the matrix"):
        truncated_svd(matrix, mode="dense")


def test_a_driver_that_returns_nan_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(30, 20)
    whole = torch.linalg.svd

    def poisoned(a: torch.Tensor, **options: object) -> object:
        u, s, vh = whole(a, **options)  # type: ignore[arg-type]
        return (u, s * float("nan"), vh) if not poisoned.seen.append(1) and len(poisoned.seen) == 1 else (u, s, vh)  # type: ignore[attr-defined]

    poisoned.seen = []  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.linalg, "svd", poisoned)
    parts = truncated_svd(matrix, mode="dense")
    assert "returned NaN" in parts.fallbacks[0]
    np.testing.assert_allclose(parts.s.numpy(), values_of(matrix), rtol=1e-5)


def test_auto_takes_exact_routes_for_small_matrices_and_many_components() -> None:
    assert truncated_svd(decaying(100, 90), 3).mode == "dense"
    assert truncated_svd(decaying(module.LARGE, module.LARGE), 300).mode == "dense"
    assert truncated_svd(decaying(2 * module.LARGE, module.LARGE), 300).mode == "gram"
    assert truncated_svd(decaying(2 * module.LARGE, module.LARGE, dtype=torch.float64), 300).mode == "dense"
