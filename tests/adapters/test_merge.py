"""Merged adapters against dense float64 arithmetic on the updates, written from the formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.adapters.merge import MergedAdapter, merge_adapters
from mergekit_px.adapters.merge_options import MergeOptions
from mergekit_px.adapters.mergers import MergeInput
from mergekit_px.adapters.open import open_adapter
from mergekit_px.adapters.save import save_peft
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import AdapterError, TensorMismatchError, UsageError

SHAPES = {"layers.0.q_proj": (14, 10), "layers.0.conv": (9, 4, 3), "embed_tokens": (6, 12)}
WEIGHTS = (0.7, -0.3, 1.1)
RANKS = (3, 2, 4)


def factors(seed: int, rank: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([seed, rank, *shape])
    kernel = [1] * (len(shape) - 2)
    b = random.normal(size=(shape[0], rank, *kernel))
    return torch.from_numpy(b).float(), torch.from_numpy(random.normal(size=(rank, *shape[1:]))).float()


def write(
    folder: Path, seed: int, rank: int, alpha: float = 6.0, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> Adapter:
    modules = []
    for name, shape in shapes.items():
        b, a = factors(seed, rank, shape)
        modules.append(LoraModule(name, a, b, alpha=alpha, embedding=name == "embed_tokens"))
    save_peft(folder, modules, base_model_name="org/base", fields={"task_type": "CAUSAL_LM"})
    return open_adapter(folder)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Adapter]:
    return [write(tmp_path / f"a{seed}", seed, rank) for seed, rank in enumerate(RANKS)]


def update(seed: int, rank: int, name: str, alpha: float = 6.0) -> np.ndarray:
    b, a = (part.double().flatten(1).numpy() for part in factors(seed, rank, SHAPES[name]))
    return alpha / rank * b @ a


def updates(name: str) -> list[np.ndarray]:
    return [update(seed, rank, name) for seed, rank in enumerate(RANKS)]


def of(merged: MergedAdapter, name: str) -> np.ndarray:
    module = next(module for module in merged.modules if module.name == name)
    return module.scale * module.b.double().flatten(1).numpy() @ module.a.double().flatten(1).numpy()


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def merge(adapters: list[Adapter], **options: Any) -> MergedAdapter:
    return merge_adapters(adapters, MergeOptions(**({"weights": WEIGHTS} | options)))


def weighted(name: str) -> np.ndarray:
    return sum(weight * delta for weight, delta in zip(WEIGHTS, updates(name), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_linear_and_cat_are_exact(name: str, adapters: list[Adapter]) -> None:
    for method in ("linear", "cat"):
        close(of(merge(adapters, method=method), name), weighted(name))
    assert {report.rank for report in merge(adapters, method="cat").reports} == {sum(RANKS)}
    assert all(report.captured_energy == pytest.approx(1) for report in merge(adapters, method="linear").reports)


@pytest.mark.parametrize("rank", [None, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_svd_is_the_nearest_of_its_rank(name: str, rank: int | None, adapters: list[Adapter]) -> None:
    merged = merge(adapters, method="svd", rank=rank)
    whole = weighted(name)
    nearest = truncated(whole, rank or max(RANKS))
    close(of(merged, name), nearest)
    report = next(report for report in merged.reports if report.name == name)
    assert report.rank == (rank or max(RANKS))
    assert report.captured_energy == pytest.approx((nearest**2).sum() / (whole**2).sum(), rel=1e-5)
    assert report.norm == pytest.approx(np.linalg.norm(nearest), rel=1e-5)
    cosines = [(nearest * delta).sum() / np.linalg.norm(nearest) / np.linalg.norm(delta) for delta in updates(name)]
    np.testing.assert_allclose(report.cosines, cosines, atol=1e-5)


def test_the_mean_is_the_default(adapters: list[Adapter]) -> None:
    merged = merge_adapters(adapters, MergeOptions(method="linear"))
    close(of(merged, "layers.0.q_proj"), sum(updates("layers.0.q_proj")) / 3)


def trim(deltas: list[dict[str, np.ndarray]], density: float, scope: str) -> list[dict[str, np.ndarray]]:
    trimmed = []
    for adapter in deltas:
        if scope == "model":
            values = np.sort(np.concatenate([np.abs(matrix).ravel() for matrix in adapter.values()]))
            cuts = dict.fromkeys(adapter, values[-max(1, int(density * len(values)))])
        else:
            cuts = {
                name: np.sort(np.abs(matrix).ravel())[-max(1, int(density * matrix.size))]
                for name, matrix in adapter.items()
            }
        trimmed.append({name: np.where(np.abs(matrix) >= cuts[name], matrix, 0) for name, matrix in adapter.items()})
    return trimmed


def consensus(matrices: list[np.ndarray], weights: tuple[float, ...], divide_by: str = "weights") -> np.ndarray:
    stack = np.stack([weight * matrix for weight, matrix in zip(weights, matrices, strict=True)])
    agree = np.sign(stack) == np.sign(stack.sum(axis=0)) * (stack.sum(axis=0) != 0)
    agree &= stack != 0
    sizes = np.abs(weights) if divide_by == "weights" else np.ones(len(weights))
    divisor = (agree * sizes[:, None, None]).sum(axis=0)
    if divide_by == "nothing":
        return (stack * agree).sum(axis=0)
    return np.where(divisor > 0, (stack * agree).sum(axis=0) / np.where(divisor > 0, divisor, 1), 0)


def all_updates() -> list[dict[str, np.ndarray]]:
    return [{name: update(seed, rank, name) for name in SHAPES} for seed, rank in enumerate(RANKS)]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("divide_by", ["weights", "count", "nothing"])
def test_ties_on_the_updates(scope: str, divide_by: str, adapters: list[Adapter]) -> None:
    merged = merge(adapters, method="ties", density=0.3, scope=scope, divide_by=divide_by, rank=4)
    for name in SHAPES:
        matrices = [adapter[name] for adapter in trim(all_updates(), 0.3, scope)]
        close(of(merged, name), truncated(consensus(matrices, WEIGHTS, divide_by), 4))


def test_magnitude_prune_on_the_updates(adapters: list[Adapter]) -> None:
    merged = merge(adapters, method="magnitude_prune", density=0.4, rank=14)
    for name in SHAPES:
        matrices = [adapter[name] for adapter in trim(all_updates(), 0.4, "model")]
        close(of(merged, name), sum(w * matrix for w, matrix in zip(WEIGHTS, matrices, strict=True)))


def test_dare_keeps_the_expectation_and_repeats(adapters: list[Adapter]) -> None:
    name = "layers.0.q_proj"
    runs = [of(merge(adapters, method="dare_linear", density=0.5, rank=10, seed=seed), name) for seed in range(200)]
    spread = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert (np.abs(np.mean(runs, axis=0) - weighted(name)) < 5 * spread + 1e-4).all()
    again = of(merge(adapters, method="dare_linear", density=0.5, rank=10, seed=3), name)
    np.testing.assert_array_equal(again, runs[3])
    close(of(merge(adapters, method="dare_linear", density=1.0, rank=10), name), weighted(name))


def test_dare_ties_elects_among_what_is_left(adapters: list[Adapter]) -> None:
    name = "layers.0.q_proj"
    merged = of(merge(adapters, method="dare_ties", density=1.0, rank=10), name)
    close(merged, consensus(updates(name), WEIGHTS))
    assert not np.allclose(merged, of(merge(adapters, method="dare_ties", density=0.5, rank=10), name))


def test_knots_with_ties_trims_over_the_whole_model(adapters: list[Adapter]) -> None:
    merged = merge(adapters, method="knots", merger="ties", density=0.3, rank=9)
    bases, parts = {}, [dict(), dict(), dict()]
    for name in SHAPES:
        u, s, vt = np.linalg.svd(np.concatenate(updates(name), axis=1), full_matrices=False)
        kept = s > 1e-8 * s[0]
        bases[name] = u[:, kept]
        for part, right in zip(parts, np.split(s[kept, None] * vt[kept], 3, axis=1), strict=True):
            part[name] = right
    for name in SHAPES:
        matrices = [part[name] for part in trim(parts, 0.3, "model")]
        close(of(merged, name), truncated(bases[name] @ consensus(matrices, WEIGHTS), 9))


def test_knots_with_a_sum_is_the_sum(adapters: list[Adapter]) -> None:
    for method in ("knots", "core"):
        merged = merge(adapters, method=method, merger="linear", rank=9)
        for name in SHAPES:
            close(of(merged, name), weighted(name))


def test_core_space_is_lossless_and_keeps_the_papers_basis(adapters: list[Adapter]) -> None:
    name = "layers.0.q_proj"
    seen: list[list[np.ndarray]] = []

    def watch(given: MergeInput) -> torch.Tensor:
        if given.name == name:
            seen.append([matrix.double().numpy() for matrix in given.matrices])
        return given.matrices[1]

    close(of(merge(adapters, method="core", merger=watch, rank=9), name), updates(name)[1])
    pairs = [factors(seed, rank, SHAPES[name]) for seed, rank in enumerate(RANKS)]
    left = np.linalg.svd(np.concatenate([6 / r * b.double() for (b, _), r in zip(pairs, RANKS, strict=True)], axis=1))[
        0
    ]
    right = np.linalg.svd(np.concatenate([a.double() for _, a in pairs]))[2]
    for core, delta in zip(seen[0], updates(name), strict=True):
        # singular vectors have no sign of their own
        np.testing.assert_allclose(np.abs(core), np.abs(left[:, :9].T @ delta @ right[:9].T), atol=1e-4)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_ties_in_core_space(scope: str, adapters: list[Adapter]) -> None:
    """The rule goes by entries, and singular vectors have no sign of their own: a flip of a basis vector flips the
    entries of all cores alike, so the result does not depend on it."""
    merged = merge(adapters, method="core", merger="ties", density=0.4, scope=scope, rank=9)
    bases, cores = {}, [dict(), dict(), dict()]
    for name in SHAPES:
        pairs = [
            (b.double().flatten(1).numpy(), a.double().flatten(1).numpy())
            for b, a in (factors(seed, rank, SHAPES[name]) for seed, rank in enumerate(RANKS))
        ]
        left = np.linalg.svd(np.concatenate([6 / rank * b for (b, _), rank in zip(pairs, RANKS, strict=True)], axis=1))
        right = np.linalg.svd(np.concatenate([a for _, a in pairs]))
        bases[name] = left[0][:, : sum(RANKS)], right[2][: sum(RANKS)]
        for core, delta in zip(cores, updates(name), strict=True):
            core[name] = bases[name][0].T @ delta @ bases[name][1].T
    for name, (left, right) in bases.items():
        matrices = [core[name] for core in trim(cores, 0.4, scope)]
        close(of(merged, name), truncated(left @ consensus(matrices, WEIGHTS) @ right, 9))


def test_isotropic_core_is_the_mean_over_the_numerical_rank(adapters: list[Adapter]) -> None:
    name = "layers.0.q_proj"
    merged = of(merge(adapters, method="core", merger="linear", isotropic=True, rank=9), name)
    u, s, vt = np.linalg.svd(weighted(name))
    rank = sum(RANKS)
    close(merged, s[:rank].mean() * u[:, :rank] @ vt[:rank])


def test_pico_damps_shared_directions_and_keeps_the_mean_norm(adapters: list[Adapter]) -> None:
    name = "layers.0.q_proj"
    merged = of(merge(adapters, method="linear", calibrate=True), name)
    pairs = [factors(seed, rank, SHAPES[name]) for seed, rank in enumerate(RANKS)]
    bs = [6 / rank * b.double().numpy() for (b, _), rank in zip(pairs, RANKS, strict=True)]
    u, s, _ = np.linalg.svd(np.concatenate(bs, axis=1), full_matrices=False)
    damping = 1 / (1 + 2 * s**2 / (s**2).sum())
    calibration = np.eye(14) + (u * (damping - 1)) @ u.T
    total = sum(
        weight * calibration @ b @ a.double().numpy() for weight, b, (_, a) in zip(WEIGHTS, bs, pairs, strict=True)
    )
    norm = np.mean([np.linalg.norm(delta) for delta in updates(name)])
    close(merged, total * norm / np.linalg.norm(total))


def test_ctm_compresses_to_bases_that_alternation_cannot_improve(adapters: list[Adapter]) -> None:
    name, rank = "layers.0.q_proj", 4
    merged = merge(adapters, method="ctm", merger="linear", rank=rank)
    deltas = updates(name)
    norms = [np.linalg.norm(delta) for delta in deltas]
    normalised = [delta / norm * np.mean(norms) for delta, norm in zip(deltas, norms, strict=True)]
    left = np.linalg.svd(np.concatenate(normalised, axis=1))[0][:, :rank]
    right = np.linalg.svd(np.concatenate([n.T for n in normalised], axis=1))[0][:, :rank]
    for _ in range(500):
        left = np.linalg.svd(np.concatenate([n @ right for n in normalised], axis=1))[0][:, :rank]
        right = np.linalg.svd(np.concatenate([n.T @ left for n in normalised], axis=1))[0][:, :rank]
    total = sum(weight * left.T @ delta @ right for weight, delta in zip(WEIGHTS, deltas, strict=True))
    expected = left @ total @ right.T
    assert np.linalg.norm(of(merged, name) - expected) < 0.02 * np.linalg.norm(expected)


def test_ctm_balance_one_keeps_the_norms(adapters: list[Adapter]) -> None:
    one, other = (merge(adapters, method="ctm", merger="linear", rank=3, balance=balance) for balance in (0.0, 1.0))
    assert not np.allclose(of(one, "layers.0.q_proj"), of(other, "layers.0.q_proj"))


def test_robust_merge_on_the_factors(tmp_path: Path) -> None:
    name, rank = "layers.0.q_proj", 5
    merged = merge_adapters(
        [write(tmp_path / f"a{s}", s, rank, alpha=5.0) for s in range(3)], MergeOptions(method="robust")
    )
    total_a, total_b, total_s = 0.0, 0.0, 0.0
    for seed in range(3):
        b, a = (part.double().numpy() for part in factors(seed, rank, SHAPES[name]))
        kept = []
        for factor in (b, a):
            cut = np.sort(np.abs(factor).ravel())[int(factor.size * 0.8) - 1]
            kept.append(np.where(np.abs(factor) >= cut, factor, 0))
        size = np.abs(kept[1]).sum(axis=1)
        scale = np.where(size > 0, np.abs(a).sum(axis=1) / np.where(size > 0, size, 1), 1)
        scale = np.maximum(scale, np.sort(scale)[int(0.8 * rank)])
        total_a, total_b, total_s = total_a + 2 * kept[1], total_b + 2 * kept[0] * scale, total_s + scale
    close(of(merged, name), total_b / total_s @ total_a)


def test_a_module_that_only_some_adapters_have(tmp_path: Path) -> None:
    both = write(tmp_path / "both", 0, 3)
    one = write(tmp_path / "one", 1, 2, shapes={"layers.0.q_proj": SHAPES["layers.0.q_proj"]})
    merged = merge_adapters([both, one], MergeOptions(method="linear", weights=(0.5, 2.0)))
    close(of(merged, "layers.0.conv"), 0.5 * update(0, 3, "layers.0.conv"))
    report = next(report for report in merged.reports if report.name == "layers.0.conv")
    assert report.cosines == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("method", ["svd", "ties", "knots", "core", "ctm"])
def test_an_adapter_of_zeros_is_no_obstacle(method: str, tmp_path: Path) -> None:
    zero = [LoraModule("m", torch.zeros(2, 6), torch.zeros(8, 2), alpha=2.0)]
    for number in range(2):
        save_peft(tmp_path / str(number), zero)
    merged = merge_adapters([open_adapter(tmp_path / str(n)) for n in range(2)], MergeOptions(method=method))
    assert of(merged, "m").shape == (8, 6)
    assert not of(merged, "m").any()


def test_scale_and_dtype(adapters: list[Adapter]) -> None:
    merged = merge(adapters, method="linear", scale=0.5, dtype="bfloat16")
    assert {module.a.dtype for module in merged.modules} == {torch.bfloat16}
    name = "layers.0.q_proj"
    assert np.linalg.norm(of(merged, name) - 0.5 * weighted(name)) < 0.01 * np.linalg.norm(weighted(name))


def test_the_result_is_an_adapter_with_the_origin_of_its_parts(adapters: list[Adapter], tmp_path: Path) -> None:
    merge(adapters, method="svd", rank=2).save(tmp_path / "merged")
    adapter = open_adapter(tmp_path / "merged")
    config = json.loads((tmp_path / "merged/adapter_config.json").read_text())
    assert (adapter.base_model_name, config["task_type"], config["r"]) == ("org/base", "CAUSAL_LM", 2)
    assert config["lora_alpha"] == 2 and not config["use_rslora"]
    assert set(adapter.keys.modules) == set(SHAPES)


# --- through a base ------------------------------------------------------------------------------------------


def test_dora_through_its_base(tmp_path: Path) -> None:
    """What depends on the base is computed on it; the update is then like any other."""
    b, a = factors(0, 2, (8, 6))
    magnitude = torch.rand(8) + 1
    base = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    save_file({"model.m.weight": base}, tmp_path / "base.safetensors")
    save_peft(tmp_path / "dora", [LoraModule("model.m", a, b, alpha=4.0, magnitude=magnitude)])
    save_peft(tmp_path / "lora", [LoraModule("m", a, b, alpha=4.0)])
    pair = [open_adapter(tmp_path / name) for name in ("dora", "lora")]

    with pytest.raises(AdapterError, match="updates of DoRA depend on the base"):
        merge_adapters(pair)
    merged = merge_adapters(
        pair, MergeOptions(method="linear", weights=(1, 1)), base=open_checkpoint(tmp_path / "base.safetensors")
    )

    plain = 2 * (b @ a).double().numpy()
    moved = base.double().numpy() + plain
    moved *= magnitude.double().numpy()[:, None] / np.linalg.norm(moved, axis=1, keepdims=True)
    close(of(merged, "model.m"), moved - base.double().numpy() + plain)


def test_orientations_through_a_base(tmp_path: Path) -> None:
    """An embedding and a matrix stored (in, out) come back as PEFT stores their factors."""
    b, a = factors(0, 2, (8, 6))
    eb, ea = factors(1, 2, (6, 10))
    base = {"h.c_fc.weight": torch.zeros(6, 8), "wte.weight": torch.zeros(10, 6)}
    save_file(base, tmp_path / "base.safetensors")
    modules = [LoraModule("h.c_fc", a, b, alpha=2.0), LoraModule("wte", ea, eb, alpha=2.0, embedding=True)]
    save_peft(tmp_path / "a", modules, fan_in_fan_out=True)
    adapter = open_adapter(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "base.safetensors")

    merged = merge_adapters([adapter, adapter], MergeOptions(method="linear"), base=checkpoint)
    merged.save(tmp_path / "merged")

    close(of(merged, "h.c_fc"), (b @ a).double().numpy())
    close(of(merged, "wte"), (eb @ ea).double().numpy())
    assert {module.name: module.embedding for module in merged.modules} == {"h.c_fc": False, "wte": True}
    stored = load_file(tmp_path / "merged/adapter_model.safetensors")
    again = open_adapter(tmp_path / "merged").bind(checkpoint)
    for target, expected in (("h.c_fc.weight", (b @ a).T), ("wte.weight", (eb @ ea).T)):
        patch = again[target]
        got = patch.merged(base[target], {role: stored[tensor.name] for role, tensor in patch.factors.items()})
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# --- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svdd"}, "unknown method 'svdd'"),
        ({"method": "core", "merger": "mean"}, "unknown merger 'mean'"),
        ({"rank": 0}, "a rank must be positive"),
        ({"density": 1.5}, "a density must be from 0 to 1"),
        ({"weights": (1.0,)}, "1 weights were given for 3 adapters"),
        ({"method": "robust", "weights": None}, "equal ranks"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, adapters: list[Adapter]) -> None:
    with pytest.raises(UsageError, match=message):
        merge(adapters, **options)


def other_shape(folder: Path) -> Adapter:
    return write(folder, 1, 2, shapes={"layers.0.q_proj": (14, 11)})


def other_names(folder: Path) -> Adapter:
    return write(folder, 1, 2, shapes={"model.layers.0.q_proj": (14, 10)})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (other_shape, TensorMismatchError, r"layers.0.q_proj is \[14, 10\] in .*first and \[14, 11\] in"),
        (other_names, AdapterError, "the adapters share no module"),
    ],
)
def test_adapters_that_do_not_fit(
    make: Callable[[Path], Adapter], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        merge_adapters([write(tmp_path / "first", 0, 3), make(tmp_path / "second")])


def test_adapters_with_more_than_factors_are_refused(tmp_path: Path) -> None:
    b, a = factors(0, 2, (8, 6))
    whole = {"base_model.model.score.weight": torch.zeros(2, 6)}
    save_peft(tmp_path / "a", [LoraModule("m", a, b, alpha=2.0)], whole=whole, fields={"modules_to_save": ["score"]})
    with pytest.raises(AdapterError, match=r"holds more than factors: .*score\.weight"):
        merge_adapters([open_adapter(tmp_path / "a")])
    save_file({"m.weight": torch.zeros(8, 6), "score.weight": torch.zeros(2, 6)}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match=r"score\.weight is replaced"):
        merge_adapters([open_adapter(tmp_path / "a")], base=open_checkpoint(tmp_path / "base.safetensors"))
