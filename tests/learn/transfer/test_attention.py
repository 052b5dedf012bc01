from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_px.learn.transfer import attention as module
from mergekit_px.learn.transfer.attention import chunked_attention


def tokens(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 3, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("scores", [1, 20, 45, 69, 70, 10**6])
def test_every_chunk_size_is_softmax_attention(scores: int) -> None:
    query, key, value = tokens(7, 0), tokens(5, 1), tokens(5, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(chunked_attention(query, key, value, scores), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: chunked_attention(*given, scores), (query, key, value))


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (100.0 * tokens(count, seed).float().detach() for count, seed in ((7, 0), (5, 1), (5, 2)))
    assert bool(torch.isfinite(chunked_attention(query, key, value, 10)).all())


def test_no_more_scores_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = []
    plain = module._room

    def counted(*given: object) -> Tensor:
        rooms.append(plain(*given))
        return rooms[-1]

    monkeypatch.setattr(module, "_room", counted)
    query, key, value = tokens(40, 0), tokens(30, 1), tokens(30, 2)
    chunked_attention(query, key, value, 150).sum().backward()
    assert [room.numel() for room in rooms] == [120, 120, 120]
