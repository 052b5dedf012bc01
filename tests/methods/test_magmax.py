"""``magmax`` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.testing import apply_method, check_method


def test_conformance() -> None:
    check_method("magmax", identity=True, symmetric=True)
    check_method("magmax", {"scale": -0.3}, symmetric=True)
    check_method("magmax", sources=1, identity=True)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.7])
def test_formula(count: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(count)
    deltas = [torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(count)]
    stacked = np.stack([delta.numpy() for delta in deltas])
    expected = scale * np.take_along_axis(stacked, np.abs(stacked).argmax(axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(apply_method("magmax", deltas, params={"scale": scale}).numpy(), expected, rtol=1e-15)


def test_of_opposite_values_the_positive_one_is_taken() -> None:
    first, second = torch.tensor([2.0, -2.0, -3.0, 0.0]), torch.tensor([-2.0, 2.0, 1.0, 0.0])
    for deltas in ([first, second], [second, first]):
        assert apply_method("magmax", deltas).tolist() == [2, 2, -3, 0]
