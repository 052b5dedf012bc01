"""``nearswap`` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_px.testing import apply_method, check_method


def test_conformance() -> None:
    check_method("nearswap")
    check_method("nearswap", {"t": 1.0}, identity=True)


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.3, 100.0])
def test_formula(t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, source = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    share = np.minimum(t / np.abs((source - base).numpy()), 1)
    expected = share * source.numpy() + (1 - share) * base.numpy()
    merged = apply_method("nearswap", [source], params={"t": t}, base=base)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [-1e-4, float("inf"), float("nan")])
def test_the_step_is_finite_and_not_negative(t: float) -> None:
    with pytest.raises(ValidationError):
        apply_method("nearswap", [torch.ones(2)], params={"t": t})
