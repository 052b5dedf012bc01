"""Task vectors that know nothing: what a route makes of them is what it gains without any knowledge of the task."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_px.learn.align.settings import AlignSettings
from mergekit_px.learn.data import derived_seed


def sham_of(name: str, delta: Tensor, settings: AlignSettings) -> Tensor:
    """A random tensor like one of a task vector: normal noise of its norm (``gauss``), or a matrix between two random
    orthogonal ones, which keeps its singular values too (``rotated``; tensors that are no matrices become noise)."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "sham", name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if settings.sham == "rotated" and delta.ndim == 2 and min(delta.shape) > 1:
        left, right = (torch.linalg.qr(draw(size, size)).Q.to(delta) for size in delta.shape)
        rotated: Tensor = left @ delta @ right
        return rotated
    noise = draw(*delta.shape).to(delta)
    size = noise.norm()
    return noise * (delta.norm() / size) if float(size) > 0 else noise
