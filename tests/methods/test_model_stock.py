"""``model_stock`` against numpy, and its geometry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def draw(count: int, shared: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and fine-tunes whose task vectors share a direction."""
    generator = torch.Generator().manual_seed(count)

    def normal() -> torch.Tensor:
        return torch.randn(12, 15, generator=generator, dtype=torch.float64)

    base, common = normal(), normal()
    return base, [base + 1e-4 * (shared * common + normal()) for _ in range(count)]


def dense(base: torch.Tensor, sources: list[torch.Tensor]) -> np.ndarray:
    deltas = [(source - base).numpy().reshape(-1) for source in sources]
    n = len(deltas)
    cosine = np.mean(
        [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(deltas, 2)]
    )
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * np.mean([source.numpy() for source in sources], axis=0) + (1 - t) * base.numpy()


def test_conformance() -> None:
    check_method("model_stock", identity=True, symmetric=True)
    check_method("model_stock", sources=2, identity=True, symmetric=True)
    check_method("model_stock", {"along": "rows"}, identity=True, symmetric=True)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shared", [0.3, 1.0, 5.0])
def test_formula(count: int, shared: float) -> None:
    base, sources = draw(count, shared)
    np.testing.assert_allclose(
        apply_method("model_stock", sources, base=base).numpy(), dense(base, sources), rtol=1e-12
    )


@pytest.mark.parametrize("count", [2, 3])
def test_each_row_by_itself(count: int) -> None:
    base, sources = draw(count)
    sources[0][3] = base[3]  # a row that one fine-tune has left alone
    merged = apply_method("model_stock", sources, params={"along": "rows"}, base=base)
    for row in range(base.shape[0]):
        if row != 3:
            np.testing.assert_allclose(merged[row].numpy(), dense(base[row], [s[row] for s in sources]), rtol=1e-12)
    assert torch.isfinite(merged).all()
    lone = apply_method("model_stock", [source[3] for source in sources], base=base[3])
    torch.testing.assert_close(merged[3], lone)


def test_two_models_by_hand() -> None:
    """Task vectors of length 1 at 60 degrees: t = 2 * 0.5 / 1.5."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])
    torch.testing.assert_close(apply_method("model_stock", [first, second]), (first + second) / 2 * (2 / 3))


def test_orthogonal_task_vectors_give_the_base() -> None:
    base = torch.tensor([3.0, 4.0])
    sources = [base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.0, 1.0])]
    assert torch.equal(apply_method("model_stock", sources, base=base), base)


def test_opposite_and_zero_task_vectors_give_the_base() -> None:
    base = torch.tensor([3.0, 4.0])
    step = torch.tensor([1.0, 2.0])
    assert torch.equal(apply_method("model_stock", [base + step, base - step], base=base), base)
    assert torch.equal(apply_method("model_stock", [base, base], base=base), base)
    assert torch.equal(apply_method("model_stock", [base + step, base], base=base), base)


def test_it_takes_two_sources_or_more() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        apply_method("model_stock", [torch.ones(2)])
