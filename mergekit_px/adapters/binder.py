"""What the families of adapters share when they are bound to a base: finding tensors, checking that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_px.adapters.base_names import BaseNames
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import AddPatch, onto
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.adapters.ties import Ties
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import AdapterError

_PACKED = ("qweight", "weight_packed", "weight_scale_inv", "weight_scale", "weight.absmax", "SCB")
"""Neighbours of a weight that show it is quantised."""


@dataclass(frozen=True)
class BindOptions:
    """Choices that an adapter's files leave open.

    Attributes:
        keep_tied: where an adapter changes one of a tied embedding and head, change both alike instead of
            untying them. Not what was trained; the file keeps its size.
        attention_output: PEFT applies the out_proj part of LoRA on ``nn.MultiheadAttention`` twice, in training
            as in merging, so ``as_trained`` adds it twice; ``once`` is for adapters trained by a PEFT that does not.
        residual_base: the base given is the residual one that a PiSSA-like start left behind.
        component: of a file for a whole pipeline, the part that the base is: ``unet``, ``transformer``,
            ``text_encoder``, ``text_encoder_2``.
    """

    keep_tied: bool = False
    attention_output: Literal["as_trained", "once"] = "as_trained"
    residual_base: bool = False
    component: str | None = None


_STORED_IN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
"""Types of models whose layers transformers keeps as ``Conv1D``, (in, out)."""


class Binder:
    """One adapter meeting one base. ``modules``: all of the adapter's, by name."""

    def __init__(
        self, base: Checkpoint, config: AdapterConfig, options: BindOptions, modules: Mapping[str, Module]
    ) -> None:
        self.base = base
        self.config = config
        self.options = options
        self.names = BaseNames(base.tensors, config.where)
        self.modules = modules
        self._resized: dict[str, tuple[int, ...]] = {}
        self.ties = Ties(base)

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take these shapes for those of the base's tensors: what the adapter itself replaces comes first."""
        self._resized = dict(shapes)

    def error(self, what: str, hint: str | None = None) -> AdapterError:
        return self.config.error(what, hint)

    def tensor(self, name: str) -> StoredTensor | None:
        """A base tensor that can be computed with. Raises AdapterError for a quantised or packed one."""
        found = self.base.tensors.get(name)
        module = name.rpartition(".")[0]
        packed = self.packed(module)
        if packed is not None and (found is None or name.endswith(".weight")):
            raise self.error(
                f"{shown(module)} is quantised in the base (it has {packed})", hint="give the base in full precision"
            )
        if found is not None and not found.dtype.arithmetic:
            raise self.error(
                f"{shown(name)} is stored as {found.dtype} in the base", hint="give the base in full precision"
            )
        if found is not None and 0 in found.shape:
            raise self.error(f"{shown(name)} is empty in the base")
        if found is not None and name in self._resized:
            return replace(found, shape=self._resized[name])
        return found

    def packed(self, module: str) -> str | None:
        """The tensor beside a module's weight that shows it is quantised."""
        return next((leaf for leaf in _PACKED if f"{module}.{leaf}" in self.base.tensors), None)

    def weight(self, module: Module) -> StoredTensor:
        """The weight of the module that an adapter's module means; for a head that is tied and so not in the file,
        the embedding under the head's name. Raises AdapterError where there is none."""
        find = self.names.find_underscored if module.flat else self.names.find
        place = find(module.name)
        found = None if place is None else self.tensor(f"{place}.weight" if place else "weight")
        if found is None and self.ties.is_missing_head(module.name):
            return self.ties.stand_in(f"{module.name}.weight")
        if found is None:
            raise self._unmatched(module)
        return found

    def _unmatched(self, module: Module) -> AdapterError:
        error = self.names.unmatched([module.name])
        parts = sorted({each.component for each in self.modules.values() if each.component})
        if len(parts) < 2:
            return error
        hint = f"it is for {', '.join(parts)}; name the one that the base is with --component (component: in a recipe)"
        return AdapterError(error.what, where=error.where, hint=hint)

    def bias(self, weight: str) -> StoredTensor | None:
        """The bias that belongs to a weight, where the base has one."""
        return self.tensor(f"{weight.removesuffix('.weight')}.bias")

    def clash(self, weight: StoredTensor, wanted: tuple[int, ...]) -> AdapterError:
        """The error for a base tensor that the adapter does not fit."""
        return self.error(
            f"{shown(weight.name)} is {list(weight.shape)} in the base, the adapter was made for {list(wanted)}",
            hint="is this the right base model?",
        )

    def check_shape(self, weight: StoredTensor, wanted: tuple[int, ...]) -> None:
        """Raises AdapterError where a base tensor has another shape."""
        if weight.shape != wanted:
            raise self.clash(weight, wanted)

    @property
    def square_in_out(self) -> bool:
        """Whether square matrices are stored (in, out): as ``fan_in_fan_out`` says, which PEFT leaves out of account
        where the layers are linear ones."""
        config = self.base.config or {}
        linear = "model_type" in config and "auto_map" not in config and config["model_type"] not in _STORED_IN_OUT
        return self.config.flag("fan_in_fan_out") and not linear

    def orientation(self, weight: StoredTensor, out: int, inside: int) -> bool:
        """Whether a matrix is stored (in, out), the transpose of a linear layer's (out, in). The shape decides; of
        a square one, ``square_in_out``. Raises AdapterError where neither fits."""
        if weight.shape == (out, inside):
            return out == inside and self.square_in_out
        if weight.shape == (inside, out):
            return True
        raise self.clash(weight, (out, inside))

    def bias_patch(self, weight: StoredTensor, value: StoredTensor, scale: float) -> AddPatch:
        """The share of an adapter's own bias. Raises AdapterError where the base has no bias to add it to."""
        bias = self.bias(weight.name)
        if bias is None:
            raise self.error(f"the adapter has a bias for {shown(weight.name)}, the base has none")
        self.check_shape(bias, value.shape)
        return AddPatch(**onto(bias), factors={"value": value}, scale=scale)


_PLACES = "shira_indices"
"""The one factor that is of integers."""


def roles(
    module: Module, config: AdapterConfig, names: Mapping[str, str], axes: tuple[int, int] = (1, 5)
) -> dict[str, StoredTensor]:
    """The factors of a module by role; all are needed.

    Args:
        names: role -> parameter name in the file.
        axes: the least and the most axes that they may have.

    Raises AdapterError for a missing half, an empty one, or one with another number of axes.
    """
    missing = [name for name in names.values() if name not in module.tensors]
    if missing:
        present = ", ".join(shown(key) for key in sorted(module.keys)[:2])
        raise config.error(f"{missing[0]} of {shown(module.name)} is missing (there is {present})")
    found = {role: module.tensors[name] for role, name in names.items()}
    for tensor in found.values():
        if tensor.dtype.kind == "integer" and not tensor.name.endswith(_PLACES):
            raise config.error(
                f"{shown(tensor.name)} is {tensor.dtype}, and factors are no integers",
                hint="it is quantised in a way that is not known; give the adapter in floating point",
            )
        if not axes[0] <= len(tensor.shape) <= axes[1] or 0 in tensor.shape:
            raise config.error(f"{shown(tensor.name)} is {list(tensor.shape)}, which is no factor of {config.kind}")
    return found


def only(module: Module, config: AdapterConfig, parameters: set[str]) -> None:
    """Raises AdapterError where a module has tensors beyond ``parameters``, or is wrapped more than once."""
    surplus = sorted(set(module.tensors) - parameters)
    if surplus:
        raise config.error(f"{shown(module.tensors[surplus[0]].name)} has no meaning for {config.kind}")
    if module.inner:
        raise config.error(f"{shown(module.name)} is adapted twice")
