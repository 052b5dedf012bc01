"""The model, in a file that `pxmerge --model file.py:function` can load by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyViT(nn.Module):
    """8 x 8 digits in patches of 2 x 2, width 48, two blocks, four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, 48) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits
