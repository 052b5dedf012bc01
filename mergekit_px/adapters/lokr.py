"""LoKr: W + s kron(w1, w2), either factor whole or a product of two, the second also in Tucker form
(arXiv 2309.14859). s = alpha / r; PEFT scales always, LyCORIS not where both factors are whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.loha import rebuilt, scale_of
from mergekit_px.adapters.patch import AdditivePatch, Factors, Patch, columns, get, onto
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})


@dataclass(frozen=True, kw_only=True, eq=False)
class LokrPatch(AdditivePatch):
    """s kron(w1, w2): row i of the result belongs to row i // b of w1 and row i % b of w2, b the rows of w2.

    Attributes:
        right_aligned: PEFT multiplies w1 (a, c) with a whole conv1d kernel w2 (b, d, k) as (1, a, c) with (b, d, k)
            and takes the numbers in that order, in training as in merging; so must we.
    """

    right_aligned: bool = False

    @property
    def scratch(self) -> float:
        return 2.0

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        import torch

        first, second = _first(factors, like), _second(factors, like)
        start, stop = (0, self.out_shape[0]) if rows is None else (rows.start, rows.stop)
        if self.right_aligned:
            whole = torch.kron(first, second).reshape(self.out_shape)
            return whole[start:stop] * self.scaling(factors)
        height, width = second.shape[:2]
        lowest, highest = start // height, -(-stop // height)
        blocks = torch.einsum("ac,bdk->abcdk", first[lowest:highest], second.reshape(height, width, -1))
        rectangle = blocks.reshape((highest - lowest) * height, -1)
        wanted = rectangle[start - lowest * height : stop - lowest * height]
        return (wanted * self.scaling(factors)).reshape(like.shape)


def _first(factors: Factors, like: torch.Tensor) -> torch.Tensor:
    if "w1" in factors:
        return get(factors, "w1", like)
    return get(factors, "w1_a", like) @ get(factors, "w1_b", like)


def _second(factors: Factors, like: torch.Tensor) -> torch.Tensor:
    if "w2" in factors:
        return get(factors, "w2", like)
    left, right = get(factors, "w2_a", like), get(factors, "w2_b", like)
    if "t2" in factors:
        return rebuilt(get(factors, "t2", like), left.T, right)
    return left @ right


def bind(module: Module, binder: Binder) -> list[Patch]:
    only(module, binder.config, set(PARAMETERS))
    factors = factors_of(module, binder.config)
    config = binder.config
    rank = rank_of(factors)
    if rank is None:
        # both factors are whole, so the rank is only in the configuration
        stated = config.pattern("rank_pattern", module.name)
        rank = int(config.number("r", 8) if stated is None else stated)
    weight, scale = binder.weight(module), scale_of(config, module.name, rank)
    right_aligned = "w2" in factors and len(factors["w2"].shape) == 3
    return [patch_of(factors, weight, scale, rank, binder, right_aligned=right_aligned)]


def factors_of(module: Module, config: AdapterConfig) -> dict[str, StoredTensor]:
    """The factors by role. Raises AdapterError for a missing half."""
    split = {f"{which}_{side}": f"lokr_{which}_{side}" for which in ("w1", "w2") for side in "ab"}
    factors: dict[str, StoredTensor] = {}
    for which, axes in (("w1", (2, 2)), ("w2", (2, 5))):
        if f"lokr_{which}" in module.tensors:
            factors |= roles(module, config, {which: f"lokr_{which}"}, axes)
            continue
        factors |= roles(module, config, {role: name for role, name in split.items() if which in role}, (2, 2))
    if "lokr_t2" in module.tensors:
        factors |= roles(module, config, {"t2": "lokr_t2"}, (3, 5))
    _check_products(factors, module, config)
    return factors


def _check_products(factors: Mapping[str, StoredTensor], module: Module, config: AdapterConfig) -> None:
    pairs = []
    if "w1_a" in factors:
        pairs.append((factors["w1_a"].shape[1], factors["w1_b"].shape[0]))
    if "w2_a" in factors and "t2" in factors:
        core = factors["t2"].shape
        pairs += [(factors["w2_a"].shape[0], core[0]), (factors["w2_b"].shape[0], core[1])]
    elif "w2_a" in factors:
        pairs.append((factors["w2_a"].shape[1], factors["w2_b"].shape[0]))
    if any(one != other for one, other in pairs) or ("t2" in factors and "w2_a" not in factors):
        raise config.error(f"the factors of {module.name} have no product")


def rank_of(factors: Mapping[str, StoredTensor]) -> int | None:
    """r, or None where no factor is split."""
    split = factors.get("w1_b") or factors.get("w2_b")
    return split.shape[0] if split is not None else None


def patch_of(
    factors: dict[str, StoredTensor],
    weight: StoredTensor,
    scale: float,
    rank: int,
    binder: Binder,
    *,
    right_aligned: bool = False,
) -> LokrPatch:
    """The patch. Raises AdapterError where the factors do not fit the weight."""
    first = factors["w1"].shape if "w1" in factors else (factors["w1_a"].shape[0], factors["w1_b"].shape[1])
    if "w2" in factors:
        second = (factors["w2"].shape[0], columns(factors["w2"].shape))
    elif "t2" in factors:
        second = (factors["w2_a"].shape[1], factors["w2_b"].shape[1] * math.prod(factors["t2"].shape[2:]))
    else:
        second = (factors["w2_a"].shape[0], factors["w2_b"].shape[1])
    shape = (first[0] * second[0], first[1] * second[1])
    if shape != (weight.shape[0], columns(weight.shape)):
        raise binder.clash(weight, shape)
    return LokrPatch(**onto(weight), factors=factors, scale=scale, rank=rank, right_aligned=right_aligned)
