"""Each spectral method against a dense float64 computation written from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_px.methods import find_method
from mergekit_px.testing import apply_method

Array = np.ndarray
SHAPES = [(24, 18), (18, 24), (20, 20)]


def draw(shape: Sequence[int], count: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=random, dtype=torch.float64) for _ in range(count)]


def merge(method: str, deltas: Sequence[torch.Tensor], params: dict[str, Any] | None = None, **given: Any) -> Array:
    return apply_method(method, deltas, given.pop("weights", None), params, **given).numpy()


def thin(matrix: Array) -> tuple[Array, Array, Array]:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def top(matrix: Array, count: int) -> Array:
    u, s, v = thin(matrix)
    return (u[:, :count] * s[:count]) @ v[:, :count].T


def polar(stack: Array) -> Array:
    u, _, v = thin(stack)
    return u @ v.T


def svd_plain(deltas: list[Array], count: int) -> Array:
    terms = []
    for delta in deltas:
        u, s, v = thin(delta)
        terms += [(s[j], np.outer(u[:, j], v[:, j])) for j in range(len(s))]
    terms.sort(key=lambda term: -term[0])
    return sum(s * term for s, term in terms[:count])


def pooled(deltas: list[Array], count: int) -> tuple[Array, Array, Array]:
    parts = [thin(delta) for delta in deltas]
    u, s, v = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    order = np.argsort(-s)[:count]
    return u[:, order], s[order], v[:, order]


def svd_orthogonalised(deltas: list[Array], count: int) -> Array:
    u, s, v = pooled(deltas, count)
    return (polar(u) * s) @ polar(v).T


def tsv_m(deltas: list[Array], count: int | None = None) -> Array:
    k = count or min(deltas[0].shape) // len(deltas)
    parts = [thin(delta) for delta in deltas]
    u, s, v = (np.concatenate([part[i][..., :k] for part in parts], axis=-1) for i in range(3))
    return (polar(u) * s) @ polar(v).T


def iso_c(deltas: list[Array]) -> Array:
    u, s, v = thin(sum(deltas))
    return s.mean() * u @ v.T


def iso_cts(deltas: list[Array], common: float = 0.8) -> Array:
    r, count = min(deltas[0].shape), len(deltas)
    own = round((r - int(r * common)) / count)
    k = r - own * count
    u, s, v = thin(sum(deltas))
    us, ss, vs = [u[:, :k]], [s[:k]], [v[:, :k]]
    for delta in deltas:
        p, e, q = thin(delta - u[:, :k] @ u[:, :k].T @ delta)
        us.append(p[:, :own])
        ss.append(e[:own])
        vs.append(q[:, :own])
    mean = np.concatenate(ss).sum() / r
    return mean * polar(np.concatenate(us, axis=1)) @ polar(np.concatenate(vs, axis=1)).T


def cart(deltas: list[Array], count: int, strength: float) -> Array:
    centre = sum(deltas) / len(deltas)
    return centre + strength * sum(top(delta - centre, count) for delta in deltas)


def star(deltas: list[Array], eta: float = 40) -> Array:
    merged = np.zeros_like(deltas[0])
    for delta in deltas:
        u, s, v = thin(delta)
        k = 1
        while s[:k].sum() < eta / 100 * s.sum():
            k += 1
        merged += (u[:, :k] * (s[:k] * s.sum() / s[:k].sum())) @ v[:, :k].T
    return merged / len(deltas)


def boosted(deltas: list[Array], beta: float) -> Array:
    u, s, v = thin(sum(deltas))
    first = int(np.argmax(np.cumsum(s) / s.sum() >= beta))
    return (u * np.maximum(s, s[first])) @ v.T


def svc(merged: Array, experts: list[Array], floor: float | None = None) -> Array:
    floor = floor or 1 / len(experts)
    u, s, v = thin(merged)
    scales = []
    for j in range(len(s)):
        row = u[:, j] @ merged
        shares = [max(floor, row @ (u[:, j] @ d) / np.sum((u[:, j] @ d) ** 2)) for d in experts]
        scales.append(len(experts) / sum(shares))
    return (u * (s * np.array(scales))) @ v.T


def wudi_adam(deltas: list[Array], steps: int, rate: float) -> Array:
    x = torch.tensor(sum(deltas), requires_grad=True)
    optimiser = torch.optim.Adam([x], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = sum(((x - torch.tensor(d)) @ torch.tensor(d).T).square().sum() / np.sum(d**2) for d in deltas)
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    return x.detach().numpy()


def self_regression(deltas: list[Array], weights: list[float], ridge: float, side: str) -> Array:
    """Vectorised normal equations of ``sum_t w_t ||(X - D_t) D_t'||^2``, or of the outputs' like."""
    if side == "outputs":
        return self_regression([d.T for d in deltas], weights, ridge, "inputs").T
    metric = sum(w * d.T @ d for w, d in zip(weights, deltas, strict=True))
    target = sum(w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True))
    metric = metric + ridge * np.trace(metric) / len(metric) * np.eye(len(metric))
    return target @ np.linalg.pinv(metric, rcond=1e-11)


def wudi_closed(deltas: list[Array], ridge: float, side: str) -> Array:
    return self_regression(deltas, [1 / np.sum(d**2) for d in deltas], ridge, side)


def dc_merge(deltas: list[Array], smoothing: str = "flat") -> Array:
    k = min(deltas[0].shape) // len(deltas)
    parts = [thin(delta) for delta in deltas]
    p, q = (polar(np.concatenate([part[i][:, :k] for part in parts], axis=1)) for i in (0, 2))
    core = np.zeros((k * len(deltas), k * len(deltas)))
    for u, s, v in parts:
        ratio = {"flat": 1.0, "linear": min(5.0, s[0] / s[k - 1])}.get(smoothing)
        shares = None if ratio is None else np.linspace(ratio, 1, k)
        s = s[:k] if shares is None else shares * s[:k].sum() / shares.sum()
        core += p.T @ (u[:, :k] * s) @ v[:, :k].T @ q
    return p @ (core * np.kron(np.eye(len(deltas)), np.ones((k, k)))) @ q.T


def dc_merge_elected(deltas: list[Array], density: float) -> Array:
    k = min(deltas[0].shape) // len(deltas)
    parts = [thin(delta) for delta in deltas]
    p, q = (polar(np.concatenate([part[i][:, :k] for part in parts], axis=1)) for i in (0, 2))
    cores = []
    for delta in deltas:
        core = p.T @ top(delta, k) @ q
        cut = np.sort(np.abs(core), axis=None)[core.size - int(density * core.size)]
        cores.append(np.where(np.abs(core) >= cut, core, 0))
    stacked = np.stack(cores)
    agrees = (np.sign(stacked) == np.sign(stacked.sum(axis=0))) & (stacked != 0)
    core = (stacked * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    return p @ (core * np.kron(np.eye(len(deltas)), np.ones((k, k)))) @ q.T


def res_merge(deltas: list[Array], head: int, budget: float = 0.2) -> Array:
    count = len(deltas)
    heads = [top(delta, head) for delta in deltas]
    tails = [delta - one for delta, one in zip(deltas, heads, strict=True)]
    units = [tail / np.linalg.norm(tail) for tail in tails]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    similarity = np.mean([np.sum(units[i] * units[j]) for i, j in pairs])
    direction = sum(units) / np.linalg.norm(sum(units))
    coherence = np.mean([np.sum(unit * direction) for unit in units])
    merged = sum(tails) / count
    if coherence > 1 / math.sqrt(count):
        exponent = 1 - 0.3 * ((similarity + 1) / 2 + (coherence + 1) / 2) / 2
        merged = direction * coherence**exponent * np.mean([np.linalg.norm(tail) for tail in tails])
    cosines = [np.sum(heads[i] * heads[j]) / np.linalg.norm(heads[i]) / np.linalg.norm(heads[j]) for i, j in pairs]
    agreement = np.mean(np.maximum(cosines, 0))
    return merged + sum(heads) / np.linalg.norm(sum(heads)) * budget * agreement * np.linalg.norm(merged)


def knots(deltas: list[Array], density: float) -> Array:
    u, s, v = thin(np.concatenate(deltas, axis=1))
    width = deltas[0].shape[1]
    parts = [(v[t * width : (t + 1) * width] * s).T for t in range(len(deltas))]
    kept = []
    for part in parts:
        cut = np.sort(np.abs(part), axis=None)[part.size - int(density * part.size)]
        kept.append(np.where(np.abs(part) >= cut, part, 0))
    stacked = np.stack(kept)
    agrees = (np.sign(stacked) == np.sign(stacked.sum(axis=0))) & (stacked != 0)
    return u @ ((stacked * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1))


def opcm(deltas: list[Array], threshold: float) -> Array:
    merged = deltas[0]
    for delta in deltas[1:]:
        u, s, vh = np.linalg.svd(merged)
        k = int(np.argmax(np.cumsum(s) / s.sum() > threshold))
        inner = u.T @ delta @ vh.T
        np.fill_diagonal(inner, 0)
        inner[:k, :k] = 0
        merged = merged + u @ inner @ vh
    return merged * np.mean([np.linalg.norm(delta) for delta in deltas]) / np.linalg.norm(merged)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[list[Array]], Array]]] = {
    "svd plain": ("svd", {"top_k": 11, "orthogonalise": False}, lambda d: svd_plain(d, 11)),
    "svd orthogonalised": ("svd", {"top_k": 11}, lambda d: svd_orthogonalised(d, 11)),
    "svd percentage": ("svd", {"top_k": "40%"}, lambda d: svd_orthogonalised(d, int(0.4 * min(d[0].shape)))),
    "svd calibrated": (
        "svd",
        {"top_k": 30, "orthogonalise": False, "calibrate": "svc"},
        lambda d: svc(svd_plain(d, 30), d),
    ),
    "tsv_m": ("tsv_m", {}, tsv_m),
    "tsv_m rank": ("tsv_m", {"rank": 4}, lambda d: tsv_m(d, 4)),
    "iso_c": ("iso_c", {}, iso_c),
    "iso_cts": ("iso_cts", {}, iso_cts),
    "iso_cts common": ("iso_cts", {"common": 0.5}, lambda d: iso_cts(d, 0.5)),
    "cart": ("cart", {"rank": "25%", "scale": 0.7}, lambda d: cart(d, min(d[0].shape) // 4, 0.7)),
    "star": ("star", {}, star),
    "star eta": ("star", {"eta": 90}, lambda d: star(d, 90)),
    "star all": ("star", {"eta": 100}, lambda d: sum(d) / len(d)),
    "subspace_boosting": ("subspace_boosting", {"beta": 0.3}, lambda d: boosted(d, 0.3)),
    "svc": ("svc", {}, lambda d: svc(d[0], d[1:])),
    "svc floor": ("svc", {"floor": 0.05}, lambda d: svc(d[0], d[1:], 0.05)),
    "wudi": ("wudi", {"steps": 20, "learning_rate": 1e-2}, lambda d: wudi_adam(d, 20, 1e-2)),
    "wudi closed": ("wudi", {"solver": "closed", "ridge": 0.1}, lambda d: wudi_closed(d, 0.1, "inputs")),
    "wudi both": (
        "wudi",
        {"solver": "closed", "ridge": 0.01, "sides": "both"},
        lambda d: (wudi_closed(d, 0.01, "inputs") + wudi_closed(d, 0.01, "outputs")) / 2,
    ),
    "actmat": ("actmat", {}, lambda d: self_regression(d, [1.0] * len(d), 0, "inputs")),
    "actmat outputs": ("actmat", {"sides": "outputs"}, lambda d: self_regression(d, [1.0] * len(d), 0, "outputs")),
    "dc_merge": ("dc_merge", {}, dc_merge),
    "dc_merge linear": ("dc_merge", {"smoothing": "linear"}, lambda d: dc_merge(d, "linear")),
    "dc_merge elected": (
        "dc_merge",
        {"smoothing": "none", "cores": "elect", "density": 0.1},
        lambda d: dc_merge_elected(d, 0.1),
    ),
    "res_merge": ("res_merge", {}, lambda d: res_merge(d, 1)),
    "res_merge head": ("res_merge", {"head": 3, "budget": 0.5}, lambda d: res_merge(d, 3, 0.5)),
    "opcm": ("opcm", {}, lambda d: opcm(d, 0.5)),
    "knots": ("knots", {}, lambda d: knots(d, 0.3)),
    "knots all": ("knots", {"density": 1.0}, lambda d: knots(d, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_formula(case: str, shape: tuple[int, int]) -> None:
    name, params, formula = CASES[case]
    deltas = draw(shape, 3)
    expected = formula([delta.numpy() for delta in deltas])
    np.testing.assert_allclose(merge(name, deltas, params), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_float32_gives_the_same_up_to_its_rounding(case: str) -> None:
    name, params, formula = CASES[case]
    deltas = [delta.float() for delta in draw((40, 60), 3)]
    expected = formula([delta.double().numpy() for delta in deltas])
    merged = merge(name, deltas, params)
    assert merged.dtype == np.float32
    assert np.linalg.norm(merged - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_scale_multiplies_and_weights_multiply_their_source(case: str) -> None:
    name, params, _ = CASES[case]
    deltas = draw((12, 9), 3)
    if name != "cart":
        scaled = merge(name, deltas, {**params, "scale": -0.5})
        np.testing.assert_allclose(scaled, -0.5 * merge(name, deltas, params), atol=1e-9)
    if name != "svc":
        weights = [0.5, -1.25, 2.0]
        by_hand = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
        np.testing.assert_allclose(
            merge(name, deltas, params, weights=weights), merge(name, by_hand, params), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("case", CASES)
def test_sources_recover_the_share_that_was_asked_for(case: str) -> None:
    name, params, formula = CASES[case]
    deltas = draw((12, 9), 3)
    if name == "svc":
        deltas[0] = deltas[1] + deltas[2]
    merged = merge(name, deltas, {**params, "recover": 0.6})
    sources = [delta.numpy() for delta in deltas[1 if name == "svc" else 0 :]]
    assert np.mean([np.vdot(merged, source) / np.vdot(source, source) for source in sources]) == pytest.approx(0.6)
    plain = formula([delta.numpy() for delta in deltas])
    cosine = np.vdot(merged, plain) / np.linalg.norm(merged) / np.linalg.norm(plain)
    assert cosine == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("svc", "opcm"))])
def test_order_of_the_sources_does_not_matter(case: str) -> None:
    name, params, _ = CASES[case]
    deltas = draw((16, 20), 4)
    np.testing.assert_allclose(merge(name, deltas[::-1], params), merge(name, deltas, params), rtol=1e-7, atol=1e-10)


def test_plain_pool_of_everything_is_task_arithmetic() -> None:
    deltas = draw((15, 22), 3)
    for count in (45, 1000, "300%"):
        merged = merge("svd", deltas, {"top_k": count, "orthogonalise": False})
        np.testing.assert_allclose(merged, sum(deltas).numpy(), atol=1e-12)


@pytest.mark.parametrize("name", ["svd", "tsv_m"])
def test_one_source_with_all_its_components_is_itself(name: str) -> None:
    (delta,) = draw((15, 22), 1)
    params = {"top_k": "100%"} if name == "svd" else {}
    np.testing.assert_allclose(merge(name, [delta], params), delta.numpy(), atol=1e-11)


@pytest.mark.parametrize("name", ["svd", "tsv_m"])
def test_orthogonal_sources_are_summed(name: str) -> None:
    left, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 8)))
    right, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 8)))
    deltas = [torch.from_numpy((left[:, i : i + 4] * [4.0, 3, 2, 1]) @ right[:, i : i + 4].T) for i in (0, 4)]
    params = {"top_k": "100%"} if name == "svd" else {}
    np.testing.assert_allclose(merge(name, deltas, params), sum(deltas).numpy(), atol=1e-11)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_isotropic_spectra_are_flat(name: str) -> None:
    merged = merge(name, [delta.float() for delta in draw((40, 30), 3)])
    values = np.linalg.svd(merged.astype(np.float64), compute_uv=False)
    if name == "iso_c":
        np.testing.assert_allclose(values, values[0], rtol=1e-5)
    assert np.linalg.matrix_rank(merged, tol=1e-4 * values[0]) == 30


def test_quota_gives_every_source_its_share_and_normalised_ignores_size() -> None:
    deltas = draw((20, 16), 2)
    loud = [deltas[0] * 100, deltas[1]]
    expected = top(loud[0].numpy(), 3) + top(loud[1].numpy(), 3)
    plain = {"top_k": 6, "orthogonalise": False}
    np.testing.assert_allclose(merge("svd", loud, {**plain, "pool": "quota"}), expected, atol=1e-9)
    np.testing.assert_allclose(merge("svd", loud, plain), top(loud[0].numpy(), 6), atol=1e-9)
    equal = [delta / delta.norm() for delta in deltas]
    sizes = [loud[0].norm().item(), loud[1].norm().item()]
    u, s, v = pooled([delta.numpy() for delta in equal], 6)
    whose = np.argsort(-np.concatenate([thin(delta.numpy())[1] for delta in equal]))[:6] // 16
    expected = (u * (s * np.array(sizes)[whose])) @ v.T
    np.testing.assert_allclose(merge("svd", loud, {**plain, "pool": "normalised"}), expected, atol=1e-9)


def test_calibration_halves_what_two_equal_sources_count_twice() -> None:
    (delta,) = draw((14, 11), 1)
    np.testing.assert_allclose(merge("svc", [2 * delta, delta, delta]), delta.numpy(), atol=1e-11)
    np.testing.assert_allclose(merge("svc", [delta / 10, delta, delta], {"floor": 0.01}), delta.numpy(), atol=1e-11)


def test_boosting_one_merge_lifts_everything_above_the_first_when_beta_is_zero() -> None:
    (delta,) = draw((14, 11), 1)
    u, s, v = thin(delta.numpy())
    np.testing.assert_allclose(merge("subspace_boosting", [delta], {"beta": 0.0}), s[0] * u @ v.T, atol=1e-10)
    np.testing.assert_allclose(merge("subspace_boosting", [delta], {"beta": 1.0}), delta.numpy(), atol=1e-10)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "subspace_boosting", "svd", "star", "wudi"])
def test_null_directions_stay_null(name: str) -> None:
    """Sources of rank 2 in 30 dimensions: nothing outside their joint span is invented or amplified."""
    random = np.random.default_rng(0)
    rows, columns = random.standard_normal((30, 6)), random.standard_normal((24, 6))
    deltas = [torch.from_numpy(rows[:, i : i + 2] @ columns[:, i : i + 2].T).float() for i in (0, 2, 4)]
    merged = merge(name, deltas, {"steps": 0} if name == "wudi" else None).astype(np.float64)
    span_rows, span_columns = np.linalg.qr(rows)[0], np.linalg.qr(columns)[0]
    inside = span_rows @ span_rows.T @ merged @ span_columns @ span_columns.T
    assert np.linalg.norm(merged - inside) < 1e-5 * np.linalg.norm(merged)
    if name == "iso_c":
        u, s, v = thin(sum(deltas).double().numpy())
        np.testing.assert_allclose(merged, s[:6].mean() * u[:, :6] @ v[:, :6].T, atol=1e-4)


def test_duplicate_sources_are_merged_once_by_orthogonalising_methods() -> None:
    (delta,) = draw((20, 16), 1)
    u, s, v = thin(delta.numpy())
    # polar([U, U]) = [U, U] / sqrt 2, so that s u v' is counted twice at half size
    expected = (u[:, :8] * s[:8]) @ v[:, :8].T
    np.testing.assert_allclose(merge("tsv_m", [delta, delta.clone()]), expected, atol=1e-6)


def test_math_of_percentages() -> None:
    deltas = draw((40, 64), 2)
    params = {"orthogonalise": False}
    for written, count in (("10%", 4), ("1%", 1), ("12.5%", 5), (5, 5), ("5", 5)):
        expected = svd_plain([delta.numpy() for delta in deltas], count)
        np.testing.assert_allclose(merge("svd", deltas, {**params, "top_k": written}), expected, atol=1e-10)
    assert math.isclose(
        np.linalg.norm(merge("svd", deltas, params)),
        np.linalg.norm(svd_plain([delta.numpy() for delta in deltas], 4)),
        rel_tol=1e-10,
    )


def test_tails_that_agree_keep_more_of_their_norm() -> None:
    shared, *own = draw((24, 18), 4)
    deltas = [shared + 0.3 * one for one in own]
    np.testing.assert_allclose(merge("res_merge", deltas), res_merge([d.numpy() for d in deltas], 1), rtol=1e-7)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_the_papers_treat_what_has_two_axes_as_matrices(method: str) -> None:
    formula = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts}[method]
    params = dict(find_method(method).presets["paper"])
    table, kernel = draw((24, 18), 3), draw((6, 4, 3, 3), 3)
    expected = formula([delta.numpy() for delta in table])
    np.testing.assert_allclose(merge(method, table, params, name="embed_tokens.weight"), expected, rtol=1e-7, atol=1e-9)
    mean = sum(delta.numpy() for delta in kernel) / 3
    np.testing.assert_allclose(merge(method, kernel, params, name="conv.weight"), mean, rtol=1e-7)
