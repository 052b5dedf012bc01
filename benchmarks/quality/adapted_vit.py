"""A vision transformer with a bottleneck adapter beside each feed-forward branch, as ACMap has it, loadable by path."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, RANK, SCALE = 48, 16, 0.1


class Bottleneck(nn.Module):
    """``s * (W_up drop(relu(W_dn u + b_dn)) + b_up)``; zero when it is new."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, RANK)
        self.up = nn.Linear(RANK, WIDTH)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = functional.dropout(torch.relu(self.down(hidden)), 0.1, self.training)
        return SCALE * torch.as_tensor(self.up(inner))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.inside = nn.Linear(WIDTH, 2 * WIDTH)
        self.outside = nn.Linear(2 * WIDTH, WIDTH)
        self.adapter = Bottleneck()

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.attention_norm(hidden)
        hidden = hidden + self.attention(normed, normed, normed, need_weights=False)[0]
        branch = self.outside(functional.gelu(self.inside(self.norm(hidden))))
        return hidden + branch + torch.as_tensor(self.adapter(hidden))


class AdaptedViT(nn.Module):
    """8 x 8 digits in patches of 2 x 2, width 48, two blocks, four heads -> the CLS feature (images, 48)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.token.expand(len(x), -1, -1), hidden], 1) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return torch.as_tensor(self.norm(hidden[:, 0]))
