"""LoHa: W + s (w1a w1b) * (w2a w2b), the product of two low-rank matrices element by element (arXiv 2108.06098).

In the Tucker form ("Proposition 3") each matrix of a convolution is rebuilt from a core t (r, r, k1, k2), w_a
(r, out) and w_b (r, in). s = alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import AdditivePatch, Factors, Patch, columns, get, onto, taken
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})

_FACTORS = {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b"}
_CORES = {"t1": "hada_t1", "t2": "hada_t2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LohaPatch(AdditivePatch):
    """s (w1a w1b) * (w2a w2b)."""

    @property
    def scratch(self) -> float:
        return 3.0

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        first = _matrix(factors, "1", rows, like)
        second = _matrix(factors, "2", rows, like)
        return first.mul_(second).mul_(self.scaling(factors)).reshape(like.shape)


def _matrix(factors: Factors, which: str, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
    left, right = get(factors, f"w{which}_a", like), get(factors, f"w{which}_b", like)
    if f"t{which}" not in factors:
        return taken(left, rows) @ right
    return rebuilt(get(factors, f"t{which}", like), taken(left.T, rows), right)


def rebuilt(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The Tucker form: (r, q, kernel) with (out, r) and (q, in) gives (out, in, kernel)."""
    import torch

    return torch.einsum("pqk,op,qi->oik", core.flatten(2), left, right)


def scale_of(config: AdapterConfig, path: str, rank: int) -> float:
    """s = alpha / r. Raises AdapterError where the configuration has another rank for the module."""
    stated = config.pattern("rank_pattern", path)
    if stated is None:
        stated = config.number("r", rank)
    if stated != rank:
        raise config.error(f"the rank of {path} is {rank} in the tensors and {stated:g} in the configuration")
    alpha = config.pattern("alpha_pattern", path)
    return (config.number("alpha", 8) if alpha is None else alpha) / rank


def bind(module: Module, binder: Binder) -> list[Patch]:
    only(module, binder.config, set(PARAMETERS))
    factors = factors_of(module, binder.config)
    weight = binder.weight(module)
    return [patch_of(factors, weight, scale_of(binder.config, module.name, rank_of(factors)), binder)]


def factors_of(module: Module, config: AdapterConfig) -> dict[str, StoredTensor]:
    """The factors by role, with both cores where there is one."""
    factors = roles(module, config, _FACTORS, (2, 2))
    if any(core in module.tensors for core in _CORES.values()):
        factors |= roles(module, config, _CORES, (3, 5))
    return factors


def rank_of(factors: Mapping[str, StoredTensor]) -> int:
    """r."""
    return factors["w1_b"].shape[0]


def _inner_ranks(factors: Mapping[str, StoredTensor]) -> set[int]:
    """The other axes that must have the length r."""
    if "t1" in factors:
        cores = {size for core in ("t1", "t2") for size in factors[core].shape[:2]}
        return cores | {factors[name].shape[0] for name in ("w1_a", "w2_a")}
    return {factors[name].shape[1] for name in ("w1_a", "w2_a")}


def patch_of(factors: dict[str, StoredTensor], weight: StoredTensor, scale: float, binder: Binder) -> LohaPatch:
    """The patch. Raises AdapterError where the factors do not fit the weight."""
    ranks = {factors[name].shape[0] for name in ("w1_b", "w2_b")} | _inner_ranks(factors)
    if len(ranks) > 1:
        raise binder.error(f"the factors for {weight.name} have no product")
    for which in "12":
        left, right = factors[f"w{which}_a"].shape, factors[f"w{which}_b"].shape
        if f"t{which}" in factors:
            core = factors[f"t{which}"].shape
            shape = (left[1], right[1] * math.prod(core[2:]))
        else:
            shape = (left[0], right[1])
        if shape != (weight.shape[0], columns(weight.shape)):
            raise binder.clash(weight, shape)
    return LohaPatch(**onto(weight), factors=factors, scale=scale, rank=rank_of(factors))
