"""Methods that choose or weigh elements of task vectors, each against numpy and at its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method, merge_tensors

WEIGHTS = [0.5, 0.3, -0.2]


def draw(count: int = 3, shape: tuple[int, ...] = (20, 30), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(1 + i) * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(count)]


def arrays(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.stack([tensor.numpy() for tensor in tensors])


@pytest.mark.parametrize(
    ("method", "params", "weights", "claims"),
    [
        ("consensus_ta", {}, None, {"symmetric": True}),
        ("consensus_ta", {"threshold": 0.2, "tasks": 1, "scale": -0.5}, WEIGHTS, {"symmetric": True}),
        ("emr", {}, None, {"identity": True, "symmetric": True}),
        ("emr", {"scale": 0.3}, None, {"symmetric": True}),
        ("metagpt", {}, None, {"identity": True, "symmetric": True}),
        ("metagpt", {"norm_scope": "tensor", "scale": 2.0}, None, {"symmetric": True}),
        ("localize_and_stitch", {}, None, {"symmetric": True}),
        ("localize_and_stitch", {"density": 1.0}, None, {"identity": True, "symmetric": True}),
        ("localize_and_stitch", {"density": [0.0, 0.1, 0.5], "trim_scope": "tensor"}, None, {}),
        ("geometric_median", {}, None, {"identity": True, "symmetric": True}),
        ("geometric_median", {"distance_scope": "tensor"}, [1.0, 0.5, 2.0], {"identity": True, "symmetric": True}),
        ("train_difference", {}, None, {"identity": True}),
        ("pcb", {}, None, {"symmetric": True}),
        ("pcb", {"scope": "tensor", "density": 0.5, "clip": 0.1, "scale": 1.0}, WEIGHTS, {"symmetric": True}),
        ("cabs", {"keep": 2, "group": 8}, WEIGHTS, {}),
        ("cabs", {"keep": 4, "group": 4}, None, {"symmetric": True}),
        ("expo", {}, None, {}),
        ("add_cosine", {}, None, {"identity": True}),
        ("add_cosine", {"similarity": "combined", "alpha": 0.2}, None, {"identity": True}),
    ],
)
def test_conformance(method: str, params: dict[str, Any], weights: list[float] | None, claims: dict[str, bool]) -> None:
    check_method(method, params, weights=weights, **claims)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tasks", [0, 1, 2, 3])
def test_consensus(threshold: float, tasks: int) -> None:
    deltas = draw()
    merged = apply_method("consensus_ta", deltas, WEIGHTS, {"threshold": threshold, "tasks": tasks, "scale": 0.7})
    stacked = arrays(deltas)
    total = np.tensordot(WEIGHTS, stacked, axes=1)
    needed = (np.abs(stacked) > threshold * np.abs(total - stacked)).sum(axis=0)
    np.testing.assert_allclose(merged.numpy(), 0.7 * total * (needed >= tasks), rtol=1e-12, atol=1e-14)


def test_the_elected_vector() -> None:
    deltas = draw()
    deltas[0][:3], deltas[1][:3], deltas[2][:3] = 1.0, -1.0, 0.0  # votes that cancel
    stacked = arrays(deltas)
    signs = np.sign(stacked.sum(axis=0))
    agreeing = np.where(np.sign(stacked) == signs, np.abs(stacked), 0.0)
    merged = apply_method("emr", deltas, params={"scale": 0.5}).numpy()
    np.testing.assert_allclose(merged, 0.5 * signs * agreeing.max(axis=0), rtol=1e-12)
    assert not merged[:3].any()


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_weights_by_squared_norms(scope: str) -> None:
    models = [{"a": a, "b": b} for a, b in zip(draw(), draw(shape=(7,), seed=4), strict=True)]
    merged = merge_tensors("metagpt", models, params={"norm_scope": scope, "scale": 1.5})
    squares = {name: np.array([(model[name].numpy() ** 2).sum() for model in models]) for name in "ab"}
    for name in "ab":
        chosen = squares["a"] + squares["b"] if scope == "model" else squares[name]
        expected = 1.5 * np.tensordot(chosen / chosen.sum(), arrays([model[name] for model in models]), axes=1)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12)
    zero = torch.zeros(4)
    assert torch.equal(apply_method("metagpt", [zero, zero]), zero)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_largest_changes_are_stitched(scope: str) -> None:
    models = [{"a": a, "b": b} for a, b in zip(draw(), draw(shape=(90,), seed=4), strict=True)]
    merged = merge_tensors("localize_and_stitch", models, params={"density": 0.1, "trim_scope": scope})
    masks: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for model in models:
        pool = np.concatenate([model[name].numpy().ravel() for name in "ab"])
        for name in "ab":
            values = np.abs(model[name].numpy())
            among = np.abs(pool) if scope == "model" else values.ravel()
            masks[name].append(values >= np.sort(among)[len(among) - int(0.1 * len(among))])
    for name in "ab":
        mask = np.stack(masks[name])
        total = (arrays([model[name] for model in models]) * mask).sum(axis=0)
        np.testing.assert_allclose(merged[name].numpy(), total / np.maximum(mask.sum(axis=0), 1), rtol=1e-12)


def objective(point: np.ndarray, sources: np.ndarray, weights: list[float]) -> float:
    return float(sum(w * np.linalg.norm(point - source) for w, source in zip(weights, sources, strict=True)))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.2, 1.0, 0.7, 1.1]])
def test_no_point_is_nearer_to_all_sources(weights: list[float]) -> None:
    sources = draw(4, (5, 4))
    merged = apply_method("geometric_median", sources, weights).numpy()
    stacked = arrays(sources)
    found = objective(merged, stacked, weights)
    gradient = sum(
        w * (merged - source) / np.linalg.norm(merged - source) for w, source in zip(weights, stacked, strict=True)
    )
    assert np.abs(gradient).max() < 1e-8
    generator = np.random.default_rng(0)
    for size in (1e-3, 1e-1, 1.0):
        assert all(
            objective(merged + size * generator.standard_normal((5, 4)), stacked, weights) > found for _ in "xyz"
        )


def test_a_source_with_half_of_the_weight_is_the_median() -> None:
    sources = draw(3, (6,))
    torch.testing.assert_close(apply_method("geometric_median", sources, [1.0, 3.0, 1.0]), sources[1])
    far = [sources[0], sources[0] + 1e-3, sources[0] + 1e6]
    assert (apply_method("geometric_median", far) - sources[0]).abs().max() < 2e-3


def test_one_median_for_the_model_or_one_for_each_tensor() -> None:
    models = [{"a": a, "b": b} for a, b in zip(draw(shape=(6,)), draw(shape=(4,), seed=9), strict=True)]
    whole = merge_tensors("geometric_median", models)
    joined = apply_method("geometric_median", [torch.cat([model["a"], model["b"]]) for model in models])
    torch.testing.assert_close(torch.cat([whole["a"], whole["b"]]), joined)
    apart = merge_tensors("geometric_median", models, params={"distance_scope": "tensor"})
    torch.testing.assert_close(apart["b"], apply_method("geometric_median", [model["b"] for model in models]))


def test_weights_of_the_geometric_median() -> None:
    for weights in ([1.0, -0.5, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(UsageError):
            apply_method("geometric_median", draw(), weights)


def test_what_is_learned_already_is_not_added() -> None:
    base, model, tuned = draw(3)
    tuned[0], model[1] = base[0], tuned[1]
    merged = apply_method("train_difference", [model, tuned], params={"alpha": 0.5}, base=base).numpy()
    a, b, c = (tensor.numpy() for tensor in (model, tuned, base))
    near, far = np.abs(b - c), np.abs(b - a)
    share = np.divide(far, near + far, out=np.zeros_like(far), where=near + far > 0)
    np.testing.assert_allclose(merged, a + np.sign(b - c) * share * np.abs(b - c) * 0.5 * 1.8, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(merged[:2], a[:2], rtol=1e-12)


def pcb(stacked: np.ndarray, density: float, clip: float) -> np.ndarray:
    """(sources, elements) -> the weighted mean of the sources, one weight for each element."""
    count, elements = stacked.shape
    ascending = np.sort(np.abs(stacked), axis=1)
    low, high = ascending[:, int(elements * clip)], ascending[:, int(elements * (1 - clip)) - 1]
    sizes = np.clip(np.abs(stacked), low[:, None], high[:, None])
    unit = (sizes - low[:, None]) / (high - low)[:, None]
    scores = np.maximum(np.exp(count * unit**2) * np.tanh(stacked * stacked.sum(axis=0)), 0)
    entry = np.sort(scores, axis=1)[:, elements - int(density * elements)][:, None]
    best = scores.max(axis=1, keepdims=True)
    shares = np.maximum(scores - entry, 0) / (best - entry)
    return (np.sign(stacked) * sizes * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-12)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_elements_compete_within_and_between_tasks(scope: str) -> None:
    models = [{"a": a, "b": b} for a, b in zip(draw(), draw(shape=(90,), seed=4), strict=True)]
    merged = merge_tensors("pcb", models, params={"density": 0.2, "clip": 0.02, "scope": scope})
    flat = {name: np.stack([model[name].numpy().ravel() for model in models]) for name in "ab"}
    if scope == "model":
        whole = pcb(np.concatenate([flat["a"], flat["b"]], axis=1), 0.2, 0.02)
        expected = {"a": whole[:600], "b": whole[600:]}
    else:
        expected = {name: pcb(flat[name], 0.2, 0.02) for name in "ab"}
    for name in "ab":
        np.testing.assert_allclose(merged[name].numpy().ravel(), 1.2 * expected[name], rtol=1e-9, atol=1e-12)


def test_sources_keep_out_of_each_others_places() -> None:
    deltas = draw(3, (4, 22))
    merged = apply_method("cabs", deltas, WEIGHTS, {"keep": 3, "group": 8, "scale": 2.0}).numpy()
    expected = np.zeros((4, 22))
    for row in range(4):
        for start in range(0, 22, 8):
            taken: set[int] = set()
            for delta, weight in zip(deltas, WEIGHTS, strict=True):
                size = np.abs(delta.numpy()[row])
                kept = 3 if start < 16 else 2  # of the six that are left, the same share
                places = sorted(range(start, min(start + 8, 22)), key=lambda at: (at in taken, -size[at]))[:kept]
                taken.update(places)
                for at in places:
                    expected[row, at] += 2 * weight * delta[row, at].item()
    np.testing.assert_allclose(merged, expected, rtol=1e-12)
    with pytest.raises(UsageError, match="cannot keep 9"):
        apply_method("cabs", deltas, params={"keep": 9, "group": 8})


def test_beyond_the_aligned_model() -> None:
    base, tuned = draw(2)
    merged = apply_method("expo", [tuned], params={"alpha": 0.5}, base=base)
    torch.testing.assert_close(merged, tuned + 0.5 * (tuned - base))


@pytest.mark.parametrize("similarity", ["columns", "combined"])
def test_more_of_the_second_where_columns_differ(similarity: str) -> None:
    for shape in ((20, 30), (6, 4, 3, 3), (9,)):
        a, b = draw(2, shape)
        b += 2 * a
        merged = apply_method("add_cosine", [a, b], params={"alpha": 0.3, "similarity": similarity}).numpy()
        x, y = a.numpy(), b.numpy()
        cosine = (x * y).sum(axis=0) / (np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0))
        if similarity == "combined":
            cosine = (cosine + (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))) / 2
        k = 1 - np.clip(cosine - 0.3, 0, 1)
        np.testing.assert_allclose(merged, (1 - k) * x + k * y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("consensus_ta", {"threshold": -1.0}),
        ("pcb", {"density": 0.0}),
        ("cabs", {"keep": 0}),
        ("localize_and_stitch", {"density": 1.5}),
        ("emr", {"scale": float("nan")}),
    ],
)
def test_bounds(method: str, params: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        apply_method(method, draw(), params=params)
