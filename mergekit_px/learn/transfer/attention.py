"""Attention whose memory has a bound, forward and backward, however many tokens there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, scores: int) -> Tensor:
    """Softmax attention, (heads, q, d) x (heads, k, d) -> (heads, q, d), with ``scores`` scores at a time at most.

    Queries are taken in chunks, of one query at least. The backward pass computes the scores of each chunk again,
    so beside inputs and gradients two buffers of ``scores`` numbers are all that is held.
    """
    size = max(1, scores // (query.shape[0] * key.shape[1]))
    if size >= query.shape[1]:
        scale = query.shape[-1] ** -0.5
        return torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1) @ value
    apply: Any = _ChunkedAttention.apply
    attended: Tensor = apply(query, key, value, size)
    return attended


class _ChunkedAttention(torch.autograd.Function):
    """With P = softmax(Q K' s) for a chunk Q and G the gradient of P V: dV += P' G, dP = G V',
    dS = P * (dP - sum(dP * P)), dQ = dS K s, dK += dS' Q s."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.size = size
        attended = torch.empty_like(query)
        room = _room(query, key, size)
        for part in _parts(query.shape[1], size):
            attended[:, part] = torch.bmm(_shares(query[:, part], key, room), value)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        gradient: Tensor = gradients[0]
        scale = query.shape[-1] ** -0.5
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        room, more_room = _room(query, key, ctx.size), _room(query, key, ctx.size)
        for part in _parts(query.shape[1], ctx.size):
            chunk, received = query[:, part], gradient[:, part]
            shares = _shares(chunk, key, room)
            of_value.baddbmm_(shares.transpose(1, 2), received)
            of_shares = more_room[: shares.numel()].view_as(shares)
            torch.bmm(received, value.transpose(1, 2), out=of_shares)
            # Row sums of dP * P are those of G * (P V), which is small.
            of_shares.sub_((received * torch.bmm(shares, value)).sum(dim=-1, keepdim=True)).mul_(shares)
            of_query[:, part] = torch.bmm(of_shares, key).mul_(scale)
            of_key.baddbmm_(of_shares.transpose(1, 2), chunk, alpha=scale)
        return of_query, of_key, of_value, None


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _room(query: Tensor, key: Tensor, size: int) -> Tensor:
    return query.new_empty(query.shape[0] * size * key.shape[1])


def _shares(chunk: Tensor, key: Tensor, room: Tensor) -> Tensor:
    """The softmax of the scores of some queries, (heads, queries, k), in ``room``."""
    shape = (chunk.shape[0], chunk.shape[1], key.shape[1])
    shares = room[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.bmm(chunk, key.transpose(1, 2), out=shares).mul_(chunk.shape[-1] ** -0.5)
    shares.sub_(shares.amax(dim=-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(dim=-1, keepdim=True))
