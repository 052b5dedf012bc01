"""What the formats without a configuration do to a weight: LoRA with its Tucker form, LoHa, LoKr, diagonal OFT,
whole differences, norms, each with the magnitudes of DoRA where they are stored.

The scale is the stored ``alpha`` over the rank; an alpha of zero, or none, means one. Where implementations differ
the rule is that of LyCORIS: magnitudes belong to the merged weight, and a LoKr of two whole factors is not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_px.adapters import loha, lokr, lora
from mergekit_px.adapters.binder import Binder, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.dora import decomposed
from mergekit_px.adapters.patch import (
    Access,
    AdditivePatch,
    AddPatch,
    Factors,
    LowRankPatch,
    Patch,
    ReplacePatch,
    get,
    onto,
    present,
)
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

_ANYWHERE = ("alpha", "magnitude", "dora_scale")
"""Roles that go with any family and do not name one."""

_BIASES = {"diff_b": AddPatch, "b_norm": AddPatch, "set_bias": ReplacePatch}
_WHOLE = {"diff": AddPatch, "w_norm": AddPatch, "set_weight": ReplacePatch}


@dataclass(frozen=True, kw_only=True, eq=False)
class DiagonalOftPatch(Patch):
    """Blocks of the OUTPUTS rotated: R^T W, R = (I + Q)(I - Q)^-1, Q = blocks - blocks^T (arXiv 2306.07280).

    An ``alpha`` bounds the norm of all of Q by alpha times the outputs; ``rescale`` then multiplies the rows.
    """

    @property
    def access(self) -> Access:
        return "tensor"

    @property
    def scratch(self) -> float:
        return 2.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        import torch

        weight = present(base)
        blocks = get(factors, "oft_blocks", weight)
        skew = blocks - blocks.transpose(1, 2)
        bound = float(factors["alpha"].item()) * weight.shape[0] if "alpha" in factors else 0.0
        norm = float(skew.norm())
        if 0.0 < bound < norm:
            skew = skew * (bound / norm)
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotation = torch.linalg.solve(identity - skew, identity + skew)
        rotated: torch.Tensor = rotation.transpose(1, 2) @ weight.reshape(*skew.shape[:2], -1)
        rotated = rotated.reshape(weight.shape)
        if "rescale" in factors:
            rotated = rotated * get(factors, "rescale", weight).reshape(-1, *[1] * (weight.dim() - 1))
        return rotated


def bind(module: Module, binder: Binder) -> list[Patch]:
    """The patches of one module. Raises AdapterError for a missing half or a shape that does not fit."""
    weight = binder.weight(module)
    own = set(module.tensors) - set(_ANYWHERE)
    patches: list[Patch] = []
    for names, build in _FAMILIES:
        if own & names:
            if not own - names <= set(_BIASES):
                break
            patches.append(_finished(build(module, weight, binder), module, binder))
            own -= names
            break
    if "bias" in module.tensors and patches:
        rank = _rank(module)
        share = binder.bias_patch(weight, module.tensors["bias"], noted_alpha(module, rank, binder.config) / rank)
        patches.append(_with_alpha(replace(share, rank=rank), module))
    patches += [_whole(role, module.tensors[role], weight, binder) for role in sorted(own & set(_WHOLE))]
    for role in sorted(own & set(_BIASES)):
        bias = binder.bias(weight.name)
        if bias is None:
            raise binder.error(f"{shown(module.tensors[role].name)} is for a bias, the base has none")
        patches.append(_whole(role, module.tensors[role], bias, binder))
    left = own - set(_WHOLE) - set(_BIASES)
    if left or not patches:
        raise binder.error(f"{shown(module.name)} is incomplete: {', '.join(sorted(module.keys)[:3])}")
    return patches


def _lora(module: Module, weight: StoredTensor, binder: Binder) -> AdditivePatch:
    pair = roles(module, binder.config, {"A": "A", "B": "B"}, (2, 5))
    rank = _rank(module)
    factors = dict(pair)
    if "mid" in module.tensors:
        factors["mid"] = mid = module.tensors["mid"]
        wanted = (pair["B"].shape[0], *pair["A"].shape[1:2], *mid.shape[2:])
        if wanted != weight.shape or mid.shape[:2] != (rank, rank):
            raise binder.clash(weight, wanted)
        patch = LowRankPatch(**onto(weight), factors=factors, rank=rank)
    else:
        patch = lora.low_rank(_as_stored(pair, weight), weight, noted_alpha(module, rank, binder.config) / rank, binder)
    return _with_alpha(patch, module)


def _rank(module: Module) -> int:
    return module.tensors["A"].shape[0]


def _loha(module: Module, weight: StoredTensor, binder: Binder) -> AdditivePatch:
    return _with_alpha(loha.patch_of(loha.factors_of(module, binder.config), weight, 1.0, binder), module)


def _lokr(module: Module, weight: StoredTensor, binder: Binder) -> AdditivePatch:
    factors = lokr.factors_of(module, binder.config)
    rank = lokr.rank_of(factors)
    patch = lokr.patch_of(factors, weight, 1.0, rank or 1, binder)
    return patch if rank is None else _with_alpha(patch, module)


def _oft(module: Module, weight: StoredTensor, binder: Binder) -> Patch:
    blocks = roles(module, binder.config, {"oft_blocks": "oft_blocks"})
    factors = blocks | {role: module.tensors[role] for role in ("alpha", "rescale") if role in module.tensors}
    shape = factors["oft_blocks"].shape
    if len(shape) == 4:
        raise binder.error(f"{shown(factors['oft_blocks'].name)} is of BOFT, which cannot be merged here")
    if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != weight.shape[0]:
        raise binder.clash(weight, (shape[0] * shape[-1], *weight.shape[1:]))
    if "rescale" in factors and factors["rescale"].elements != weight.shape[0]:
        raise binder.clash(weight, (factors["rescale"].elements, *weight.shape[1:]))
    return DiagonalOftPatch(**onto(weight), factors=factors)


_FAMILIES: tuple[tuple[frozenset[str], Callable[[Module, StoredTensor, Binder], Patch]], ...] = (
    (frozenset({"A", "B", "mid", "bias"}), _lora),
    (loha.PARAMETERS, _loha),
    (lokr.PARAMETERS, _lokr),
    (frozenset({"oft_blocks", "rescale"}), _oft),
)


def _finished(patch: Patch, module: Module, binder: Binder) -> Patch:
    """The patch with the module's magnitudes around it: one for each output, but for older ``dora_scale``, which
    have one for each input."""
    magnitude = module.tensors.get("dora_scale") or module.tensors.get("magnitude")
    if magnitude is None:
        return patch
    if not isinstance(patch, AdditivePatch):
        raise binder.error(f"{shown(magnitude.name)} has no meaning beside a rotation")
    return decomposed(patch, magnitude, int("dora_scale" in module.tensors and is_by_input(magnitude)), binder)


def is_by_input(scale: StoredTensor) -> bool:
    """Whether a ``dora_scale`` belongs to inputs: (1, in, 1, ...), not (out, 1, 1, ...)."""
    return len(scale.shape) > 1 and scale.shape[0] == 1 and scale.shape[1] != 1


def _whole(role: str, tensor: StoredTensor, target: StoredTensor, binder: Binder) -> Patch:
    if math.prod(tensor.shape) != target.elements:
        raise binder.clash(target, tensor.shape)
    if role.startswith("set_"):
        return ReplacePatch(target=target.name, source=None, out_shape=target.shape, factors={"value": tensor})
    return AddPatch(**onto(target), factors={"value": tensor})


def _with_alpha(patch: AdditivePatch, module: Module) -> AdditivePatch:
    alpha = module.tensors.get("alpha")
    return patch if alpha is None else replace(patch, factors={**patch.factors, "alpha": alpha})


def noted_alpha(module: Module, rank: int, config: AdapterConfig) -> float:
    """The rank, for a scale of one, unless diffusers noted a configuration for the module's component."""
    prefix = f"{module.component}." if module.component else ""
    values = {name.removeprefix(prefix): value for name, value in config.values.items() if name.startswith(prefix)}
    if "lora_alpha" not in values:
        return float(rank)
    return lora.alpha_of(AdapterConfig(config.kind, values, config.where), module.name, rank)


def _as_stored(pair: dict[str, StoredTensor], weight: StoredTensor) -> dict[str, StoredTensor]:
    """Some programs store the factors of a linear layer as 1x1 convolutions, or the other way round; the numbers
    are the same."""
    kernel = weight.shape[2:]
    down, up = pair["A"], pair["B"]
    if len(down.shape) == len(weight.shape) or {*kernel, *down.shape[2:], *up.shape[2:]} - {1}:
        return pair
    ones = (1,) * len(kernel)
    return {"A": replace(down, shape=(*down.shape[:2], *ones)), "B": replace(up, shape=(*up.shape[:2], *ones))}
