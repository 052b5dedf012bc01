"""``esm`` against numpy, from inputs rather than Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import NonFiniteError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Operands
from mergekit_px.testing import check_method


def test_conformance() -> None:
    check_method("esm", symmetric=True)


def call(deltas: list[np.ndarray], grams: list[np.ndarray], **params: object) -> torch.Tensor:
    method = find_method("esm")
    tensors = [torch.from_numpy(one) for one in [*deltas, *grams]]
    return method(Operands(tensors, [1.0] * len(deltas), method.params(**params), name="up.weight"))


def draw(shape: tuple[int, int], count: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(shape[0])
    deltas = [generator.normal(size=shape) * (1 + number) for number in range(count)]
    return deltas, [generator.normal(size=(40, shape[1])) @ generator.normal(size=(shape[1],) * 2) for _ in deltas]


@pytest.mark.parametrize("shape", [(9, 7), (6, 12), (12, 3)])
def test_it_is_the_merge_of_principal_components_of_what_outputs_change_by(shape: tuple[int, int]) -> None:
    deltas, inputs = draw(shape)
    keep = shape[0] // 3
    left, right = [], []
    for delta, seen in zip(deltas, inputs, strict=True):
        _, values, vectors = np.linalg.svd(seen @ delta.T)
        variances = np.zeros(shape[0])
        variances[: len(values)] = values**2
        scales = (variances[:keep] / variances[:keep].mean()).clip(1e-30) ** 0.15 * (variances[:keep] > 1e-12)
        scales /= scales.mean()
        left.append(vectors[:keep].T * scales)
        right.append(vectors[:keep] @ delta * scales[:, None] * np.linalg.norm(delta) ** 2)
    rows = np.concatenate(right) / np.mean([np.linalg.norm(delta) for delta in deltas]) ** 2
    columns = np.linalg.norm(rows, axis=0)
    rows *= (columns / columns.mean()) ** 2
    factors = []
    for stack in (np.concatenate(left, axis=1), rows):
        u, s, v = np.linalg.svd(stack, full_matrices=False)
        used = s > 1e-10 * s[0]
        factors.append(u[:, used] @ v[used] * s.mean())
    found = call(deltas, [seen.T @ seen / len(seen) for seen in inputs])
    np.testing.assert_allclose(found.numpy(), 2 * factors[0] @ factors[1], rtol=1e-6, atol=1e-8)


def test_a_source_alone_with_nothing_favoured_keeps_the_span_of_its_outputs() -> None:
    deltas, inputs = draw((5, 8), count=1)
    found = call(deltas, [inputs[0].T @ inputs[0]], gain=1.0, polarise=0.0, spread=0.0).numpy()
    values = np.linalg.svd(deltas[0], compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), np.full(5, values.mean()), rtol=1e-9)
    np.testing.assert_allclose(found, np.linalg.svd(deltas[0])[0] @ np.linalg.svd(deltas[0])[2][:5] * values.mean())


def test_what_has_no_statistics_or_no_values() -> None:
    deltas, inputs = draw((6, 4), count=2)
    plain = find_method("tsv_m")
    expected = plain(Operands([torch.from_numpy(one) for one in deltas], [1.0, 1.0], plain.params(), name="up.weight"))
    assert torch.equal(call(deltas, []), expected)
    zeros = [np.zeros((6, 4))] * 2
    assert not call(zeros, [seen.T @ seen for seen in inputs]).any()
    assert not call(deltas, [np.zeros((4, 4))] * 2).any()
    with pytest.raises(NonFiniteError, match="Gram matrix"):
        call(deltas, [np.full((4, 4), np.nan)] * 2)
