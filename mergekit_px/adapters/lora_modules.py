"""LoRA adapters as plain factors, whatever format they came in: what conversion and merging work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.base_names import BaseNames
from mergekit_px.adapters.binder import BindOptions, roles
from mergekit_px.adapters.lora import alpha_of, is_attention_output, pattern_path
from mergekit_px.adapters.lycoris import is_by_input, noted_alpha
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor

if TYPE_CHECKING:
    import torch

_PEFT_FACTORS = {"A": "lora_A", "B": "lora_B"}
_EMBEDDING_FACTORS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_PEFT_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The factors of one module; dW = alpha / r B A.

    Attributes:
        name: the module's path in the class that was trained.
        a: (r, in), (r, in, *kernel) for a convolution, (r, vocabulary) for an embedding.
        b: (out, r), (out, r, 1, ...), (dimension, r).
        magnitude: of DoRA: one for each output.
        embedding: the base holds the transpose of dW.
        component: of a pipeline.
        flat: the name has underscores where the module's has dots.
        prefix: kohya's, where the component alone does not tell it.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None
    embedding: bool = False
    component: str | None = None
    flat: bool = False
    prefix: str | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class LoraSource:
    """The modules of a LoRA adapter, in any format, read when they are asked for.

    Args:
        base: resolves names with underscores for dots; without it they stay as they are.
        options: choices that the files leave open.

    Raises AdapterError for an adapter that is not LoRA, cannot be merged, or holds more than factors.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint | None = None, options: BindOptions | None = None) -> None:
        config = adapter.config
        more = [tensor.name for tensor in [*adapter.keys.whole.values(), *adapter.keys.tokens.values()]]
        if more:
            raise config.error(
                f"the adapter holds more than factors: {shown(more[0])}",
                hint="apply it to its base, or extract it without those (--include)",
            )
        if config.kind == "LORA":
            adapter.check(options or BindOptions())
        elif config.kind not in ("KOHYA", "DIFFUSERS", "MIXED"):
            raise config.error(f"{config.kind} is not LoRA")
        self.adapter = adapter
        self._names = BaseNames(base.tensors, adapter.label) if base is not None else None
        self.modules: Mapping[str, Module] = adapter.of_component(options.component if options else None)[0]
        for module in self.modules.values():
            _check_roles(module, adapter)
        self._reader = open_reader(adapter.checkpoint)

    def load(self, key: str) -> LoraModule:
        """The factors of one module, in their storage dtype."""
        module, config = self.modules[key], self.adapter.config
        stored, embedding = _factors(module, self.adapter)
        loaded = {role: read_tensor(self._reader, tensor) for role, tensor in stored.items()}
        rank = loaded["A"].shape[0]
        if config.kind == "LORA":
            alpha = alpha_of(config, pattern_path(module), rank)
        elif "alpha" in loaded:
            alpha = float(loaded["alpha"].item()) or float(rank)
        else:
            alpha = noted_alpha(module, rank, config)
        found = LoraModule(
            # PEFT's wrapper stays in the name where it says that the update is added twice
            name=module.path if is_attention_output(module) else module.name,
            a=loaded["A"],
            b=loaded["B"],
            alpha=alpha,
            magnitude=loaded["magnitude"].flatten() if "magnitude" in loaded else None,
            embedding=embedding,
            component=module.component,
            flat=module.flat,
            prefix=module.prefix,
        )
        return self._dotted(found) if module.flat and self._names is not None else found

    def _dotted(self, module: LoraModule) -> LoraModule:
        assert self._names is not None
        place = self._names.find_underscored(module.name)
        if place is None:
            raise self._names.unmatched([module.name])
        return replace(module, name=place, flat=False)

    def close(self) -> None:
        self._reader.close()


def read_lora_modules(adapter: Adapter, base: Checkpoint | None = None) -> list[LoraModule]:
    """All modules of a LoRA adapter; see LoraSource."""
    source = LoraSource(adapter, base)
    try:
        return [source.load(key) for key in source.modules]
    finally:
        source.close()


def _factors(module: Module, adapter: Adapter) -> tuple[dict[str, StoredTensor], bool]:
    """The factors by role, and whether they are of an embedding."""
    config = adapter.config
    if config.kind != "LORA":
        factors = roles(module, config, {"A": "A", "B": "B"}, (2, 5))
        if "alpha" in module.tensors:
            factors["alpha"] = module.tensors["alpha"]
        for role in ("magnitude", "dora_scale"):
            if role in module.tensors:
                factors["magnitude"] = module.tensors[role]
        if "dora_scale" in module.tensors and is_by_input(module.tensors["dora_scale"]):
            raise config.error(f"the magnitudes of {shown(module.name)} belong to inputs, which only LyCORIS has")
        return factors, False
    embedding = any(name in module.tensors for name in _EMBEDDING_FACTORS.values())
    factors = roles(module, config, _EMBEDDING_FACTORS if embedding else _PEFT_FACTORS, (2, 5))
    if _PEFT_MAGNITUDE in module.tensors:
        factors["magnitude"] = module.tensors[_PEFT_MAGNITUDE]
    return factors, embedding


def _check_roles(module: Module, adapter: Adapter) -> None:
    factors, _ = _factors(module, adapter)
    surplus = {tensor.name for tensor in module.tensors.values()} - {tensor.name for tensor in factors.values()}
    if surplus or module.inner:
        what = shown(min(surplus)) if surplus else f"{shown(module.name)}, a module of bare parameters"
        raise adapter.config.error(f"only plain factors can be taken, there is {what}", hint="apply it to its base")
    a, b = factors["A"].shape, factors["B"].shape
    if b[1] != a[0] or any(size != 1 for size in b[2:]):
        raise adapter.config.error(f"the factors of {shown(module.name)} have no product")
