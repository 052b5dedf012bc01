"""MiSS: the inputs are cut into blocks of r that share one learned block M (arXiv 2409.15371).

Default: W_j + M^T for every block j, the last one cut short where r does not divide the inputs; M is (r, out).
``mini``: M is (r, m) and its columns repeat. ``bat``: for every r x r block W_ij + W_ij M_i + M_i, M (out / r, r, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import Access, Factors, LowRankPatch, Patch, get, onto, present
from mergekit_px.adapters.peft_keys import Module

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"miss_block"})


@dataclass(frozen=True, kw_only=True, eq=False)
class MissPatch(LowRankPatch):
    """dW = M^T [I I I ...], so of rank r exactly."""

    def pair(self, factors: Factors, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        block = get(factors, "M", like)
        rank, (out, inside) = block.shape[0], self.out_shape
        left = block.repeat(1, out // block.shape[1]).T
        tiles = torch.eye(rank, dtype=like.dtype, device=like.device).repeat(1, -(-inside // rank))
        return left, tiles[:, :inside]


@dataclass(frozen=True, kw_only=True, eq=False)
class MissBatPatch(Patch):
    """W_ij + W_ij M_i + M_i for every block row i and block column j."""

    @property
    def access(self) -> Access:
        return "tensor"

    @property
    def scratch(self) -> float:
        return 2.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        whole = present(base)
        block = get(factors, "M", whole)
        size = block.shape[-1]
        out, inside = self.out_shape
        grid = whole.reshape(out // size, size, inside // size, size).transpose(1, 2)
        changed = grid + grid @ block[:, None] + block[:, None]
        return changed.transpose(1, 2).reshape(whole.shape)


def bind(module: Module, binder: Binder) -> list[Patch]:
    factors = roles(module, binder.config, {"M": "miss_block"}, (2, 3))
    only(module, binder.config, set(PARAMETERS))
    weight = binder.weight(module)
    shape = factors["M"].shape
    if len(weight.shape) != 2:
        raise binder.clash(weight, shape)
    out, inside = weight.shape
    if len(shape) == 3:
        size = shape[-1]
        if shape != (out // size, size, size) or out % size or inside % size:
            raise binder.clash(weight, (shape[0] * size, inside))
        return [MissBatPatch(**onto(weight), factors=factors)]
    if out % shape[1] or shape[0] > inside or (shape[1] != out and shape[1] != binder.config.number("mini_r", out)):
        raise binder.clash(weight, (shape[1], inside))
    return [MissPatch(**onto(weight), factors=factors, rank=shape[0])]
