"""HiRA: W * (1 + B A), element by element, without a scale, on linear, embedding and convolution layers
(Huang et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.lora import low_rank
from mergekit_px.adapters.patch import Factors, LowRankPatch, Patch, present
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
    embedding = "hira_embedding_A" in module.tensors or "hira_embedding_B" in module.tensors
    if embedding:
        pair = roles(module, config, {"A": "hira_embedding_A", "B": "hira_embedding_B"}, (2, 2))
        only(module, config, {"hira_embedding_A", "hira_embedding_B"})
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank:
            raise config.error(f"the factors of {module.name} have no product")
        binder.check_shape(weight, (pair["A"].shape[1], pair["B"].shape[0]))
        inner = LowRankPatch(
            target=weight.name, source=weight.name, out_shape=weight.shape, factors=pair, rank=rank, transposed=True
        )
    else:
        pair = roles(module, config, {"A": "hira_A", "B": "hira_B"}, (2, 5))
        only(module, config, {"hira_A", "hira_B"})
        inner = low_rank(pair, weight, 1.0, binder)
    stated = config.pattern("rank_pattern", module.name)
    if stated is None:
        stated = config.number("r", inner.rank)
    if stated != inner.rank:
        raise config.error(
            f"the rank of {module.name} is {inner.rank} in the tensors and {stated:g} in the configuration"
        )
    return [
        HiraPatch(target=weight.name, source=weight.name, out_shape=weight.shape, factors=inner.factors, inner=inner)
    ]
