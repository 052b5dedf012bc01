"""AdaLoRA: W + s B diag(E) A on linear and 2d convolution layers (arXiv 2303.10512, eq. 3), s = alpha / (r + 1e-5).

r is ``init_r``: the scaling stays that of the first rank when ranks are pruned, so the tensors' own rank does not
enter. A convolution's A is (r, in * kernel), flat.
"""

from __future__ import annotations

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import LowRankPatch, Patch, columns
from mergekit_px.adapters.peft_keys import Module

PARAMETERS = frozenset({"lora_A", "lora_B", "lora_E", "ranknum"})

_EPSILON = 1e-5


def bind(module: Module, binder: Binder) -> list[Patch]:
    config = binder.config
    only(module, config, set(PARAMETERS))
    if all(0 in tensor.shape for tensor in module.tensors.values()):
        return []  # pruned away
    factors = roles(module, config, {"A": "lora_A", "B": "lora_B", "E": "lora_E"}, (2, 2))
    weight = binder.weight(module)
    down, up, singular = (factors[role].shape for role in ("A", "B", "E"))
    if len(down) != 2 or up[1:] != down[:1] or singular != (down[0], 1):
        raise config.error(f"the factors of {module.name} have no product")
    transposed = False
    if len(weight.shape) == 2:
        transposed = binder.orientation(weight, up[0], down[1])
    elif (weight.shape[0], columns(weight.shape)) != (up[0], down[1]):
        raise binder.clash(weight, (up[0], down[1]))
    first_rank = config.number("init_r", 12)
    alpha = config.number("lora_alpha", 8)
    return [
        LowRankPatch(
            target=weight.name,
            source=weight.name,
            out_shape=weight.shape,
            factors=factors,
            scale=(alpha if alpha > 0 else first_rank) / (first_rank + _EPSILON),
            rank=down[0],
            transposed=transposed,
        )
    ]
