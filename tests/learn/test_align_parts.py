"""Pieces, maps and shams of ``pxmerge align`` by themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_px.learn.align.direct import activation_maps, procrustes, theseus
from mergekit_px.learn.align.fixed import FixedMap
from mergekit_px.learn.align.pieces import pieces_of
from mergekit_px.learn.align.routes import sham_of
from mergekit_px.learn.align.settings import AlignSettings


def test_fused_projections_are_three_pieces() -> None:
    assert [piece.label for piece in pieces_of("a.qkv.weight", 9, 3)] == [
        f"a.qkv.weight[{start}:{start + 3}]" for start in (0, 3, 6)
    ]
    assert len(pieces_of("a.in_proj_weight", 9, 3)) == 3
    assert len(pieces_of("a.qkv.weight", 5, 3)) == len(pieces_of("a.mlp.weight", 9, 3)) == 1


def test_procrustes_is_the_nearest_map() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(procrustes(states.T @ (states @ turn)), turn, rtol=1e-9, atol=1e-9)
    wide = procrustes(torch.randn(6, 9, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(wide @ wide.T, torch.eye(6).double(), rtol=1e-9, atol=1e-9)


def test_procrustes_leaves_alone_what_does_not_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    states = torch.nn.functional.pad(torch.randn(50, 4, generator=generator), (0, 3))
    product = states.T @ torch.nn.functional.pad(states[:, :4] @ turn, (0, 3))
    found = procrustes(product)
    torch.testing.assert_close(found, torch.block_diag(turn, torch.eye(3)), rtol=0, atol=1e-5)
    noisy = procrustes(product + 1e-9 * torch.randn(7, 7, generator=generator))
    torch.testing.assert_close(noisy, found, rtol=0, atol=1e-5)
    assert torch.equal(procrustes(torch.zeros(2, 3)), torch.eye(2, 3))


def test_theseus_undoes_a_change_of_basis() -> None:
    """If every activation of B is that of A turned, the transported change does to B what the change did to A."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weight, bias, change = draw(40, 5), draw(4, 5), draw(4), draw(4, 5)
    inward, outward = torch.linalg.qr(draw(5, 5))[0], torch.linalg.qr(draw(4, 4))[0]
    outputs = states @ weight.T + bias
    crossed = {"layer": (states.T @ (states @ inward), outputs.T @ (outputs @ outward))}
    deltas = {"layer.weight": change, "layer.bias": bias, "norm": bias, "odd": bias}
    shapes = {"layer.weight": (4, 5), "layer.bias": (4,), "norm": (4,), "odd": (7,)}
    fixed = FixedMap(partial(theseus, maps=activation_maps(crossed)), across_shapes=True)
    moved = fixed.moved(deltas, {}, shapes)
    torch.testing.assert_close(states @ inward @ moved["layer.weight"].T, states @ change.T @ outward)
    torch.testing.assert_close(moved["layer.bias"], bias @ outward)
    assert set(moved) == {"layer.weight", "layer.bias", "norm"}


@pytest.mark.parametrize("sham", ["gauss", "rotated"])
def test_a_sham_is_random_and_as_large(sham: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = AlignSettings(sham=sham)
    for shape in ((5, 7), (6,), (1, 4), (2, 3, 4), ()):
        delta = torch.randn(shape, generator=generator, dtype=torch.float64)
        made = sham_of("x", delta, settings)
        assert made.shape == delta.shape and made.norm().item() == pytest.approx(delta.norm().item())
        assert torch.equal(made, sham_of("x", delta, settings))
        assert delta.ndim == 0 or abs(torch.cosine_similarity(made.flatten(), delta.flatten(), dim=0).item()) < 0.95
        if len(shape) == 2 and min(shape) > 1:
            values = torch.linalg.svdvals(made), torch.linalg.svdvals(delta)
            assert torch.allclose(*values, rtol=1e-9) == (sham == "rotated")
