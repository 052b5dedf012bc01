"""What adapters store whole: norms by LN tuning (arXiv 2312.11420), and rows of embeddings at indices that only the
configuration has (trainable tokens)."""

from __future__ import annotations

from typing import Any

from mergekit_px.adapters.binder import Binder, only
from mergekit_px.adapters.patch import Patch, ReplacePatch, RowsReplacedPatch
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

PARAMETERS = frozenset({"ln_tuning_layers"})


def bind(module: Module, binder: Binder) -> list[Patch]:
    """The weights and biases of norms."""
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


def bind_rows(path: str, rows: StoredTensor, shapes: dict[str, tuple[int, ...]], binder: Binder) -> Patch:
    """The patch of one embedding (or of a head: a linear layer's rows are its outputs).

    Args:
        path: of the embedding module, in the trained class.
        rows: (tokens, dimension).
        shapes: of tensors that the adapter resizes, by their name in the base.
    """
    place = binder.names.module(path)
    weight = binder.tensor(f"{place}.weight")
    if weight is None:
        raise binder.names.unmatched([f"{path}.weight"])
    indices = _indices(path, binder)
    shape = shapes.get(weight.name, weight.shape)
    if len(rows.shape) != 2 or rows.shape != (len(indices), *shape[1:]):
        raise binder.error(
            f"{shown(rows.name)} is {list(rows.shape)} for {len(indices)} tokens of {shown(weight.name)} {list(shape)}"
        )
    outside = [index for index in indices if not 0 <= index < shape[0]]
    if outside:
        raise binder.error(f"token {outside[0]} is outside of {shown(weight.name)}, which has {shape[0]} rows")
    return RowsReplacedPatch(
        target=weight.name, source=weight.name, out_shape=shape, factors={"value": rows}, indices=indices
    )


def _indices(path: str, binder: Binder) -> tuple[int, ...]:
    value: Any = binder.config.values.get("trainable_token_indices") or binder.config.values.get("token_indices")
    if isinstance(value, dict):
        value = next((listed for name, listed in value.items() if path == name or path.endswith(f".{name}")), None)
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise binder.error(f"the configuration has no token indices for {shown(path)}")
    return tuple(value)
