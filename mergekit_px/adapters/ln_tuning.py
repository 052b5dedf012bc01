"""LN tuning: the weights and biases of norms, trained and stored whole (arXiv 2312.11420)."""

from __future__ import annotations

from mergekit_px.adapters.binder import Binder, only
from mergekit_px.adapters.patch import Patch, ReplacePatch
from mergekit_px.adapters.peft_keys import Module

PARAMETERS = frozenset({"ln_tuning_layers"})


def bind(module: Module, binder: Binder) -> list[Patch]:
    only(module, binder.config, {"ln_tuning_layers", "ln_tuning_layers.bias"})
    weight = binder.weight(module)
    patches: list[Patch] = []
    for role, tensor in module.tensors.items():
        target = binder.bias(weight.name) if role.endswith(".bias") else weight
        if target is None:
            raise binder.error(f"the adapter has a bias for {module.name}, the base has none")
        binder.check_shape(target, tensor.shape)
        patches.append(ReplacePatch(target=target.name, source=None, out_shape=tensor.shape, factors={"value": tensor}))
    return patches
