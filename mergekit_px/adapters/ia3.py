"""(IA)^3: the inputs of feed-forward layers, and the outputs of others, times a learned vector (arXiv 2205.05638).

On weights: columns scaled where the layer is a feed-forward one, else rows, and then the bias too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import Factors, Patch, get, onto, present, taken
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"ia3_l"})


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalePatch(Patch):
    """W times a vector (role ``vector``) along an axis.

    Attributes:
        offset: added to the vector first (LyCORIS stores the difference to one).
        groups: of a grouped convolution, whose second axis is one group's inputs while the vector has all.
    """

    axis: int
    offset: float = 0.0
    groups: int = 1

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        vector = get(factors, "vector", block).flatten() + self.offset
        further = [1] * (block.dim() - 2)
        if self.groups > 1:
            table = vector.reshape(self.groups, -1).repeat_interleave(self.out_shape[0] // self.groups, dim=0)
            return block * taken(table, rows).reshape(block.shape[0], -1, *further)
        if self.axis == 0:
            return block * taken(vector, rows).reshape(-1, *[1] * (block.dim() - 1))
        return block * vector.reshape(1, -1, *further)


def bind(module: Module, binder: Binder) -> list[Patch]:
    config = binder.config
    vector = roles(module, config, {"vector": "ia3_l"})["vector"]
    only(module, config, set(PARAMETERS))
    weight = binder.weight(module)
    return scale_patches(vector, weight, on_input=_is_feedforward(module, vector, binder), offset=0.0, binder=binder)


def scale_patches(
    vector: StoredTensor, weight: StoredTensor, *, on_input: bool, offset: float, binder: Binder
) -> list[Patch]:
    """The patches of a layer's weight and, where its outputs are scaled, of its bias. Raises AdapterError where
    the vector does not fit."""
    length = math.prod(vector.shape)
    if len(weight.shape) < 2:
        raise binder.clash(weight, (length, length))
    axis, groups = int(on_input), 1
    if len(weight.shape) == 2:
        square = weight.shape[0] == weight.shape[1]
        if (square and binder.square_in_out) or (not square and length == weight.shape[1 - axis]):
            axis = 1 - axis  # stored (in, out)
    if on_input and len(weight.shape) > 2 and length % weight.shape[1] == 0:
        groups = length // weight.shape[1]
    if length != weight.shape[axis] * groups or weight.shape[0] % groups:
        raise binder.error(
            f"{shown(vector.name)} has {length} elements, {shown(weight.name)} is {list(weight.shape)} in the base",
            hint="is this the right base model?",
        )
    patches: list[Patch] = [_scaled(weight, vector, axis, offset, groups)]
    bias = None if on_input else binder.bias(weight.name)
    if bias is not None:
        patches.append(_scaled(bias, vector, 0, offset, 1))
    return patches


def _scaled(tensor: StoredTensor, vector: StoredTensor, axis: int, offset: float, groups: int) -> ScalePatch:
    return ScalePatch(**onto(tensor), factors={"vector": vector}, axis=axis, offset=offset, groups=groups)


def _is_feedforward(module: Module, vector: StoredTensor, binder: Binder) -> bool:
    """The shape of a linear layer's vector tells, (1, in) or (out, 1); else ``feedforward_modules`` does."""
    if len(vector.shape) == 2 and vector.shape[0] != vector.shape[1]:
        return vector.shape[0] == 1
    value = binder.config.values.get("feedforward_modules")
    if isinstance(value, str):
        try:
            return re.fullmatch(value, module.name) is not None
        except re.error as error:
            raise binder.error(f"'feedforward_modules' is not a regular expression: {error}") from None
    return any(module.name.endswith(name) for name in binder.config.names("feedforward_modules"))
