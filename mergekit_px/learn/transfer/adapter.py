"""The adapter: a new factor for the target from the target's factor and the source's.

Source: MergeNet (arXiv 2404.13322), equations 2 and 3, with the choices that they leave open:

    a^ = a / rms(a), b^ = b / rms(b)
    m  = sum_i softmax(w)_i Attn_i(a^, b^)            over the forms rr, rc, cr, cc
    o  = a + gate rms(a) FFN(m)
    o  = o |a| / |o|                                   Frobenius norms, with keep_norm

or, in the form of the paper and its code, without scales, gate and kept norm (the mean learnt or plain):

    m  = mean_i LayerNorm_i(a + Attn_i(a, b))
    o  = LayerNorm(m + FFN(m))

``a``: (r_s, m), the target's factor. ``b``: (r_l, M), the source's. A form names what the tokens are: rows (r) or
columns (c) of ``a`` for the queries, of ``b`` for keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.learn.data import derived_seed, seeded
from mergekit_px.learn.transfer.attention import chunked_attention
from mergekit_px.learn.transfer.plan import Adapter, Form

Shape = tuple[int, int]


class FactorAttention(nn.Module):
    """Attention of one form: (r_s, m) and (r_l, M) -> (r_s, m), through linear maps that make the widths meet.

    All heads together are ``max((d_q + d_k) // 2, min_width)`` wide, d_q and d_k being the widths of the tokens.
    """

    def __init__(self, form: Form, target: Shape, source: Shape, settings: Adapter) -> None:
        super().__init__()
        self._query_rows, self._key_rows = form[0] == "r", form[1] == "r"
        self._scores = settings.scores
        query_width = target[1] if self._query_rows else target[0]
        key_width = source[1] if self._key_rows else source[0]
        heads = settings.heads or 1
        inner = max((query_width + key_width) // 2, settings.min_width)
        inner = min(inner, settings.max_width or inner)
        self._heads, self._width = heads, max(1, inner // heads)
        inner = heads * self._width
        self.query = nn.Linear(query_width, inner)
        self.key = nn.Linear(key_width, inner)
        self.value = nn.Linear(key_width, inner)
        self.out = nn.Linear(inner, query_width)
        self.norm = nn.LayerNorm(query_width) if settings.form == "paper" else None

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        queries = target if self._query_rows else target.T
        keys = source if self._key_rows else source.T
        query, key, value = self._split(self.query(queries)), self._split(self.key(keys)), self._split(self.value(keys))
        attended = chunked_attention(query, key, value, self._scores)
        mixed: Tensor = self.out(attended.transpose(0, 1).flatten(1))
        if self.norm is not None:
            mixed = self.norm(queries + mixed)
        return mixed if self._query_rows else mixed.T

    def _split(self, tokens: Tensor) -> Tensor:
        """(tokens, heads * width) -> (heads, tokens, width)."""
        return tokens.reshape(-1, self._heads, self._width).transpose(0, 1)


class AttentionMix(nn.Module):
    """The mean of the forms: under learnt softmax weights, equal at the start, or plain."""

    def __init__(self, target: Shape, source: Shape, settings: Adapter) -> None:
        super().__init__()
        self.forms = nn.ModuleList(FactorAttention(form, target, source, settings) for form in settings.forms)
        self.weights = nn.Parameter(torch.zeros(len(settings.forms)), requires_grad=settings.mean == "learned")

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        weights = torch.softmax(self.weights, dim=0)
        parts = [weight * form(target, source) for weight, form in zip(weights, self.forms, strict=True)]
        return torch.stack(parts).sum(dim=0)


class LinearMix(nn.Module):
    """The paper's baseline: xi2((xi1(b))'), two linear maps of the source's factor alone, (r_l, M) -> (r_s, m)."""

    def __init__(self, target: Shape, source: Shape) -> None:
        super().__init__()
        self.columns = nn.Linear(source[1], target[0])
        self.rows = nn.Linear(source[0], target[1])

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        mixed: Tensor = self.rows(self.columns(source).T)
        return mixed


class TransferLayer(nn.Module):
    """One knowledge-transfer layer."""

    def __init__(self, target: Shape, source: Shape, settings: Adapter) -> None:
        super().__init__()
        self.mix = AttentionMix(target, source, settings) if settings.kind == "lpka" else LinearMix(target, source)
        hidden = min(2 * target[1], settings.max_width or 2 * target[1])
        self.widen = nn.Linear(target[1], hidden)
        self.narrow = nn.Linear(hidden, target[1])
        self.norm = nn.LayerNorm(target[1]) if settings.form == "paper" else None
        self.gate = nn.Parameter(torch.tensor(settings.gate), requires_grad=self.norm is None)
        self._keep_norm = settings.keep_norm

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        if self.norm is not None:
            mixed = self.mix(target, source)
            given: Tensor = self.norm(mixed + self.narrow(functional.gelu(self.widen(mixed))))
            return given
        scale = _rms(target)
        mixed = self.mix(target / _above_zero(scale), source / _above_zero(_rms(source)))
        changed: Tensor = target + self.gate * scale * self.narrow(functional.gelu(self.widen(mixed)))
        if not self._keep_norm:
            return changed
        norm: Tensor = torch.linalg.vector_norm(target)
        return changed * (norm / _above_zero(torch.linalg.vector_norm(changed)))


def _rms(matrix: Tensor) -> Tensor:
    return matrix.square().mean().sqrt()


def _above_zero(value: Tensor) -> Tensor:
    """One instead of zero: a matrix of zeros stays what it is."""
    return torch.where(value > 0, value, torch.ones_like(value))


class AdapterStack(nn.Module):
    """The layers that serve one direction of one pair.

    Parameters are drawn from (seed, label) and nothing else, on the CPU, so that a pair begins the same whatever
    other pairs there are and whichever model is called the target.
    """

    def __init__(self, target: Shape, source: Shape, settings: Adapter, *, seed: int, label: str) -> None:
        super().__init__()
        with seeded(torch.device("cpu"), derived_seed(seed, "adapter", label)):
            layers = [TransferLayer(target, source, settings) for _ in range(settings.layers or 1)]
        self.layers = nn.ModuleList(layers)
        if settings.init == "zero":
            for layer in layers:
                nn.init.zeros_(layer.narrow.weight)
                nn.init.zeros_(layer.narrow.bias)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        for layer in self.layers:
            target = layer(target, source)
        return target


def both_ways(forth: AdapterStack, back: AdapterStack, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """New factors for target and source; each layer of either stack takes what both layers before it gave."""
    for to_target, to_source in zip(forth.layers, back.layers, strict=True):
        target, source = to_target(target, source), to_source(source, target)
    return target, source
