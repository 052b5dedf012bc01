"""Spectral methods on real tensors: what counts as a matrix, noise floors, bad input, rounds over the sources."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.errors import NonFiniteError, TensorMismatchError, UsageError
from mergekit_px.kernels import svd as svd_kernel
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Operands
from mergekit_px.methods.isotropic import specific_count
from mergekit_px.methods.matrices import component_count, is_table
from mergekit_px.testing import apply_method, check_method

METHODS = [
    *("svd", "tsv_m", "iso_c", "iso_cts", "cart", "star", "subspace_boosting", "svc", "wudi"),
    *("actmat", "dc_merge", "knots", "opcm", "res_merge"),
]


def draw(shape: Sequence[int], count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=random) for _ in range(count)]


def merge(
    method: str, deltas: Sequence[torch.Tensor], params: dict[str, Any] | None = None, **options: Any
) -> torch.Tensor:
    given = {"steps": 3, **(params or {})} if method == "wudi" else params
    return apply_method(method, deltas, None, given, **options)


def unmerged(name: str, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a tensor gets that is no matrix."""
    return deltas[0] if name == "svc" else sum(deltas[1:], deltas[0]) / len(deltas)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("svd", {}),
        ("svd", {"orthogonalise": False, "calibrate": "svc"}),
        ("svd", {"pool": "quota", "top_k": 7}),
        ("svd", {"pool": "normalised", "top_k": "55%"}),
        ("tsv_m", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("cart", {}),
        ("star", {}),
        ("subspace_boosting", {}),
        ("wudi", {"steps": 5}),
        ("wudi", {"solver": "closed", "sides": "both"}),
        ("actmat", {}),
        ("dc_merge", {}),
        ("knots", {}),
        ("res_merge", {}),
        ("ortho_merge", {}),
    ],
)
def test_conformance(name: str, params: dict[str, Any]) -> None:
    check_method(name, params, symmetric=True)


def test_conformance_where_order_matters() -> None:
    check_method("opcm")
    # With the default floor unrelated sources are all scaled by exactly T, which puts sums onto rounding ties.
    check_method("svc", {"floor": 0.37})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (5,), (1, 6), (6, 1), (1, 4, 3), (0, 5), (3, 0)])
def test_what_is_no_matrix_gets_the_mean(name: str, shape: tuple[int, ...]) -> None:
    deltas = draw(shape)
    torch.testing.assert_close(merge(name, deltas), unmerged(name, deltas))


@pytest.mark.parametrize("name", METHODS)
def test_tables_get_the_mean_unless_wanted(name: str) -> None:
    deltas = draw((12, 8))
    table = "model.embed_tokens.weight"
    torch.testing.assert_close(merge(name, deltas, name=table), unmerged(name, deltas))
    wanted = merge(name, deltas, {"embeddings": "spectral"}, name=table)
    torch.testing.assert_close(wanted, merge(name, deltas, name="model.layers.0.mlp.up_proj.weight"))
    assert not torch.allclose(wanted, unmerged(name, deltas))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight",
        "bert.embeddings.word_embeddings.weight", "visual_model.text_projection.weight", "shared.weight",
        "classifier.weight", "score.weight", "head.weight", "gpt_neox.embed_in.weight", "embed_out.weight",
        "output.weight", "encoder.patch_embedding.weight",
    ],
)  # fmt: skip
def test_names_of_tables(name: str) -> None:
    assert is_table(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj.weight", "bert.encoder.layer.0.attention.output.dense.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight", "layers.0.feed_forward.w1.weight", "t",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    ],
)  # fmt: skip
def test_names_of_other_matrices(name: str) -> None:
    assert not is_table(name)


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_are_matrices_of_flattened_rows(name: str) -> None:
    deltas = draw((8, 3, 2, 2))
    flat = merge(name, [delta.reshape(8, 12) for delta in deltas])
    torch.testing.assert_close(merge(name, deltas), flat.reshape(8, 3, 2, 2))
    narrow = draw((8, 6, 3))
    flat = merge(name, [delta.reshape(8, 18) for delta in narrow])
    torch.testing.assert_close(merge(name, narrow), flat.reshape(8, 6, 3))


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_can_be_the_mean(name: str) -> None:
    deltas = [torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    means = [merge(name, deltas, {"stack": "mean"}), merge(name, [delta.flatten() for delta in deltas])]
    torch.testing.assert_close(means[0].flatten(), means[1])


@pytest.mark.parametrize("name", METHODS)
def test_stacked_experts_are_merged_one_by_one(name: str) -> None:
    deltas = draw((4, 9, 7))
    apart = torch.stack([merge(name, [delta[number] for delta in deltas]) for number in range(4)])
    torch.testing.assert_close(merge(name, deltas, name="layers.0.mlp.experts.gate_up_proj"), apart)
    torch.testing.assert_close(merge(name, deltas, {"stack": "experts"}), apart)
    flat = merge(name, deltas, {"stack": "flatten"}, name="layers.0.mlp.experts.gate_up_proj")
    torch.testing.assert_close(flat, merge(name, deltas))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("split", "sizes"), [(3, (5, 5, 5)), ("3", (5, 5, 5)), ("9+4+2", (9, 4, 2))])
def test_fused_tensors_are_split(name: str, split: int | str, sizes: tuple[int, ...]) -> None:
    deltas = draw((15, 10))
    pieces = zip(*(delta.split(sizes) for delta in deltas), strict=True)
    apart = torch.cat([merge(name, list(piece)) for piece in pieces])
    torch.testing.assert_close(merge(name, deltas, {"split": split}), apart)


def test_expert_stacks_are_split_within_each_expert() -> None:
    deltas = draw((2, 6, 5))
    apart = merge("iso_c", [delta.reshape(4, 3, 5) for delta in deltas], {"stack": "experts"})
    torch.testing.assert_close(merge("iso_c", deltas, {"stack": "experts", "split": 2}), apart.reshape(2, 6, 5))


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^w: 10 rows cannot be split into 3 equal parts$"):
        merge("iso_c", draw((10, 4)), {"split": 3}, name="w")
    with pytest.raises(UsageError, match=r"^w: the parts 4\+5 do not add up to 10 rows$"):
        merge("iso_c", draw((10, 4)), {"split": "4+5"}, name="w")


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_is_refused_by_name(name: str) -> None:
    deltas = draw((10, 8))
    deltas[1][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^layer\.w: .* holds a NaN or an infinity"):
        merge(name, deltas, name="layer.w")


@pytest.mark.parametrize("name", METHODS)
def test_different_shapes_are_refused(name: str) -> None:
    method = find_method(name)
    for shapes in (((10, 8), (10, 9)), ((5,), (6,))):
        tensors = [torch.ones(shape) for shape in shapes]
        operands = Operands(tensors=tensors, weights=(1.0, 1.0), params=method.params(), name="w", shape=shapes[0])
        if name == "svc" and len(shapes[0]) == 1:
            continue
        with pytest.raises(TensorMismatchError, match=r"^w: sources of shapes"):
            method(operands)


@pytest.mark.parametrize("name", METHODS)
def test_zero_deltas_change_nothing(name: str) -> None:
    assert torch.equal(merge(name, [torch.zeros(9, 7)] * 3), torch.zeros(9, 7))
    merged = merge(name, [torch.zeros(9, 7), *draw((9, 7), 2)])
    assert bool(merged.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_more_sources_than_the_rank(name: str) -> None:
    merged = merge(name, draw((3, 8), 7))
    assert bool(merged.isfinite().all()) and merged.shape == (3, 8)


@pytest.mark.parametrize("value", [0, -1, "0%", "-5%", "0", "ten", "10 %", 2.5, True, None])
def test_a_count_that_keeps_nothing_is_refused(value: object) -> None:
    for name, parameter in (("svd", "top_k"), ("cart", "rank")):
        with pytest.raises(ValidationError, match="must be a whole number of at least 1, or a percentage above 0"):
            find_method(name).params.model_validate({parameter: value})


def test_counts() -> None:
    assert component_count(64, 10) == 64
    assert component_count("10%", 768) == 76
    assert component_count("0.1%", 20) == 1
    assert component_count("100%", 20) == 20


@pytest.mark.parametrize(("rank", "sources", "own"), [(768, 8, 19), (100, 3, 7), (5, 3, 0), (1, 4, 0), (3, 40, 0)])
def test_task_specific_directions_of_iso_cts(rank: int, sources: int, own: int) -> None:
    assert specific_count(rank, sources, 0.8) == own
    assert specific_count(rank, sources, 1.0) == 0


class Stored(Sequence[torch.Tensor]):
    """Sources that are made when asked for; counts how many are alive at once, and how often each was asked for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.reads = 0

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return self.tensors[index].clone()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(10, 8), (6, 10, 8)])
def test_sources_are_read_once_a_round_however_many_matrices_a_tensor_holds(name: str, shape: tuple[int, ...]) -> None:
    method = find_method(name)
    sources = Stored(draw(shape, 4))
    params = method.params.model_validate({"stack": "experts", **({"steps": 1} if name == "wudi" else {})})
    operands = Operands(tensors=sources, weights=(1.0,) * 4, params=params, name="w", shape=shape)
    method(operands)
    rounds = {"iso_cts": 2, "cart": 2, "knots": 3}.get(name, 1)
    assert sources.reads == 4 * rounds + 1  # the first source tells shape and storage


def bf16_models(rank: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bfloat16 base and three sources that differ by few strong directions, so by full-rank rounding noise too."""
    random = torch.Generator().manual_seed(0)
    base = (torch.randn(96, 80, generator=random) * 0.02).bfloat16()
    sources = []
    for _ in range(3):
        update = torch.randn(96, rank, generator=random) @ torch.randn(rank, 80, generator=random)
        sources.append((base.float() + 0.003 * update).bfloat16())
    return base, sources


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "subspace_boosting"])
def test_rounding_noise_of_16_bit_checkpoints_is_not_amplified(name: str) -> None:
    base, sources = bf16_models()
    delta = merge(name, sources, base=base, dtype=torch.float32) - base.float()
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    assert values[9] < 0.3 * values[8], "three directions of each of three sources"
    loud = merge(name, sources, {"noise_floor": False}, base=base, dtype=torch.float32) - base.float()
    values = np.linalg.svd(loud.double().numpy(), compute_uv=False)
    assert values[9] > 0.3 * values[8]


def test_rounding_noise_takes_no_part_in_the_orthogonalisation_of_tsv_m() -> None:
    base, sources = bf16_models()
    signal = merge("tsv_m", sources, {"rank": 3}, base=base, dtype=torch.float32)
    torch.testing.assert_close(merge("tsv_m", sources, base=base, dtype=torch.float32), signal)
    loud = merge("tsv_m", sources, {"noise_floor": False}, base=base, dtype=torch.float32)
    assert float((loud - signal).norm()) > 0.1 * float((signal - base.float()).norm())


@pytest.mark.parametrize("name", ["iso_c", "subspace_boosting"])
def test_amplified_noise_is_warned_about(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base, sources = bf16_models()
    with caplog.at_level(logging.WARNING):
        merge(name, sources, base=base, name="w")
        assert not caplog.records
        merge(name, sources, {"noise_floor": False}, base=base, name="w")
    assert "w: 71 of 80 components lie below rounding noise" in caplog.text


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "subspace_boosting"])
def test_updates_that_do_not_exceed_the_noise_are_kept_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    sources = []
    for seed in (1, 2):
        moved = torch.rand(64, 48, generator=torch.Generator().manual_seed(seed)) < 0.02
        sources.append(torch.where(moved, base * 1.0079, base))
    with caplog.at_level(logging.WARNING):
        merged = merge(name, sources, base=base, name="w", dtype=torch.float32)
    assert "does not exceed rounding noise; nothing was clipped" in caplog.text
    assert not torch.equal(merged, base.float())


def test_sources_in_float32_on_a_bfloat16_base_have_no_rounding_noise() -> None:
    base = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().float()
    small = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) * 1e-5
    merged = merge("iso_c", [base + small], base=base) - base
    assert np.linalg.matrix_rank(merged.numpy(), tol=1e-5) == 48


def test_shared_directions_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    (delta,) = draw((40, 30), 1)
    with caplog.at_level(logging.WARNING):
        merge("tsv_m", [delta, delta.clone()], name="w")
    assert "w: sources share 15 left and 15 right directions up to rounding" in caplog.text


def test_adam_that_cannot_leave_the_sum_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    deltas = draw((12, 8), 3)
    small = [1e-4 * delta for delta in deltas]
    with caplog.at_level(logging.WARNING):
        merge("wudi", small, {"steps": 300}, name="w")
        merge("wudi", deltas, {"solver": "closed"}, name="w")
        assert not caplog.records
        merge("wudi", deltas, {"steps": 300}, name="w")
    assert "w: 300 steps of 1e-05 move an element by 0.003 at most" in caplog.text


def test_corrections_that_lengthen_a_merge_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    deltas = draw((24, 20), 8)
    total = torch.stack(deltas).sum(0)
    with caplog.at_level(logging.WARNING):
        merge("svc", [total, *deltas], name="w")
        assert not caplog.records  # a plain sum gets shorter, or stays about as it is
        merge("svd", deltas, {"top_k": "100%", "calibrate": "svc", "recover": 0.6}, name="w")
        assert not caplog.records  # whose size is found afterwards
        merge("svd", deltas, {"top_k": "100%", "calibrate": "svc"}, name="w")
    assert "w: calibration makes the update" in caplog.text
    with caplog.at_level(logging.WARNING):
        merge("subspace_boosting", [deltas[0][:, :1] @ deltas[1][:1] + 0.1 * deltas[2]], name="v")
    assert "v: boosting makes the update" in caplog.text


def test_a_driver_that_fails_does_not_end_the_merge(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deltas = draw((20, 16))
    expected = merge("tsv_m", deltas)
    whole = torch.linalg.svd
    calls: list[int] = []

    def flaky(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return whole(*args, **options)

    monkeypatch.setattr(svd_kernel.torch.linalg, "svd", flaky)
    with caplog.at_level(logging.WARNING):
        merged = merge("tsv_m", deltas, name="w")
    assert "w: SVD (default driver) failed: did not converge" in caplog.text
    torch.testing.assert_close(merged, expected)


def test_a_merge_without_its_sources_is_not_scaled_by_them(caplog: pytest.LogCaptureFixture) -> None:
    deltas = draw((20, 16), 1)
    with caplog.at_level(logging.WARNING):
        merged = merge("svc", [torch.zeros(20, 16), *deltas, *deltas], {"recover": 0.6}, name="w")
    assert not merged.any()
    assert "w: its sources find 0 of their updates in the merge, too little to scale it by" in caplog.text


def test_a_calibration_composes_with_any_merge() -> None:
    deltas = draw((20, 16))
    summed = apply_method("task_arithmetic", deltas)
    by_steps = merge("svc", [summed, *deltas])
    at_once = merge("svd", deltas, {"top_k": "300%", "orthogonalise": False, "calibrate": "svc"})
    torch.testing.assert_close(by_steps, at_once, rtol=1e-4, atol=1e-5)
    assert float(by_steps.norm()) != pytest.approx(float(summed.norm()), rel=1e-3)
