"""``ortho_merge`` against numpy, and where its rotations are not settled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method

Array = np.ndarray


def draw(shape: tuple[int, ...], count: int = 4) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(count)]


def merged(base: Array, deltas: list[Array], conflicts: bool, residual: float) -> Array:
    one = np.eye(base.shape[1])
    rotations, skews = [], []
    for delta in deltas:
        rows = (delta * sum(deltas)).sum(axis=1) < 0 if conflicts else np.ones(len(base), dtype=bool)
        u, _, vh = np.linalg.svd(base.T @ (base + delta * rows[:, None]))
        rotations.append(u @ vh)
        skews.append(np.linalg.inv(u @ vh + one) @ (u @ vh - one))
    total = sum(skews)
    total *= np.mean([np.linalg.norm(skew) for skew in skews]) / np.linalg.norm(total)
    rotation = np.linalg.inv(one - total) @ (one + total)
    left = [base + delta - base @ turn for delta, turn in zip(deltas, rotations, strict=True)]
    return base @ rotation + residual * sum(left) / len(deltas)


@pytest.mark.parametrize("conflicts", [True, False])
def test_rotations_are_merged_in_their_algebra(conflicts: bool) -> None:
    base, *deltas = draw((30, 12))
    deltas = [0.3 * delta for delta in deltas]
    params = {"rotations": "conflicts" if conflicts else "whole", "residual": 0.4, "ridge": 0.0}
    found = apply_method("ortho_merge", [base + delta for delta in deltas], params=params, base=base).numpy()
    expected = merged(base.numpy(), [delta.numpy() for delta in deltas], conflicts, 0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_one_rotation_is_found_again() -> None:
    base, noise = draw((30, 12), 2)
    rotation = torch.linalg.matrix_exp(0.1 * (noise[:12] - noise[:12].T))
    params = {"rotations": "whole", "residual": 0.0, "ridge": 0.0}
    torch.testing.assert_close(
        apply_method("ortho_merge", [base @ rotation], params=params, base=base), base @ rotation
    )


def test_inputs_that_the_base_does_not_use_are_not_turned() -> None:
    base, *deltas = draw((6, 40))  # more inputs than outputs: most of a rotation is open
    sources = [base + 0.01 * delta for delta in deltas]
    found = apply_method("ortho_merge", sources, base=base)
    assert (found - base).norm() < 2 * max((source - base).norm() for source in sources)


def test_there_is_nothing_to_turn_without_a_base() -> None:
    with pytest.raises(UsageError, match="there is none"):
        apply_method("ortho_merge", draw((5, 4)))
