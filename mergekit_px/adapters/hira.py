"""HiRA: W * (1 + B A), element by element, without a scale, on linear, embedding and convolution layers
(Huang et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.lora import check_rank, low_rank, low_rank_of_embedding
from mergekit_px.adapters.patch import Factors, LowRankPatch, Patch, onto, present
from mergekit_px.adapters.peft_keys import Module

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"})


@dataclass(frozen=True, kw_only=True, eq=False)
class HiraPatch(Patch):
    """W + W * (B A)."""

    inner: LowRankPatch

    @property
    def scratch(self) -> float:
        return 2.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        return block.addcmul(block, self.inner.delta(factors, rows, block))


def bind(module: Module, binder: Binder) -> list[Patch]:
    config = binder.config
    weight = binder.weight(module)
    if "hira_embedding_A" in module.tensors or "hira_embedding_B" in module.tensors:
        pair = roles(module, config, {"A": "hira_embedding_A", "B": "hira_embedding_B"}, (2, 2))
        only(module, config, {"hira_embedding_A", "hira_embedding_B"})
        inner = low_rank_of_embedding(module, pair, 1.0, binder)
    else:
        pair = roles(module, config, {"A": "hira_A", "B": "hira_B"}, (2, 5))
        only(module, config, {"hira_A", "hira_B"})
        inner = low_rank(pair, weight, 1.0, binder)
    check_rank(config, module.name, inner.rank)
    return [HiraPatch(**onto(weight), factors=inner.factors, inner=inner)]
