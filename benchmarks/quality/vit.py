"""The model, in a file that `pxmerge --model file.py:function` can load by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyViT(nn.Module):
    """8 x 8 digits in patches of 2 x 2, four heads of attention."""

    def __init__(self, width: int = 48, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


def larger() -> TinyViT:
    return TinyViT(128, 4)
