"""The updates dW of an adapter as factored matrices, (out, in) whatever the base stores, read one module at a time."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.dora import DoraPatch
from mergekit_px.adapters.experts import ExpertSlicePatch, ExpertsPatch
from mergekit_px.adapters.lora import repeats
from mergekit_px.adapters.lora_modules import LoraModule, LoraSource
from mergekit_px.adapters.patch import ChainPatch, KeepPatch, LowRankPatch, Patch, ReplacePatch, RowsReplacedPatch
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Update:
    """dW of one module.

    Attributes:
        name: of the module in the class that was trained.
        matrix: (out, in * kernel), float32, the scale within.
        shape: (out, in, *kernel).
        rank: of the adapter's factors.
        dtype: of the adapter's factors on disk.
        repeats: how often a file's factors are added to make dW.
    """

    name: str
    matrix: LowRank
    shape: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    embedding: bool = False
    component: str | None = None
    flat: bool = False
    prefix: str | None = None
    repeats: int = 1

    def module(self, factors: LowRank, dtype: torch.dtype) -> LoraModule:
        """Factors of another update of the same module, as they are written: scale 1."""
        kernel = self.shape[2:]
        b, a = (factors.left / self.repeats).to(dtype), factors.right.T.to(dtype).contiguous()
        if kernel:
            a, b = a.reshape(factors.rank, *self.shape[1:]), b.reshape(*b.shape, *[1] * len(kernel))
        return LoraModule(
            self.name,
            a,
            b,
            alpha=float(factors.rank),
            embedding=self.embedding,
            component=self.component,
            flat=self.flat,
            prefix=self.prefix,
        )


class UpdateSource(Protocol):
    """Where the updates of one adapter come from."""

    adapter: Adapter
    names: Collection[str]
    """Keys that mean the same module in every adapter."""

    def load(self, name: str) -> Update: ...

    def close(self) -> None: ...


def open_updates(adapter: Adapter, base: Checkpoint | None, options: BindOptions) -> UpdateSource:
    """The updates of an adapter. Raises AdapterError for one whose updates have no such form, or need a base."""
    return LoraUpdates(adapter, options) if base is None else BoundUpdates(adapter, base, options)


class LoraUpdates:
    """Of a LoRA adapter by itself, modules by their names in the adapter."""

    def __init__(self, adapter: Adapter, options: BindOptions) -> None:
        self.adapter = adapter
        self._options = options
        magnitudes = ("magnitude", "dora_scale", "lora_magnitude_vector")
        if any(role in magnitudes for module in adapter.keys.modules.values() for role in module.tensors):
            raise adapter.config.error("the updates of DoRA depend on the base's weights", hint=_BASE)
        if adapter.kind not in ("LORA", "KOHYA", "DIFFUSERS", "MIXED"):
            raise adapter.config.error(f"the updates of {adapter.kind} need the base", hint=_BASE)
        self._source = LoraSource(adapter, options=options)
        self.names: Collection[str] = self._source.modules

    def load(self, name: str) -> Update:
        import torch

        from mergekit_px.kernels.low_rank import LowRank

        module, stored = self._source.load(name), self._source.modules[name]
        times = repeats(stored, self._options)
        matrix = LowRank.from_adapter(module.b.flatten(1).float(), module.a.flatten(1).float(), times * module.scale)
        dtype = module.a.dtype if module.a.dtype.itemsize > 1 else torch.float32
        return Update(
            _written_name(stored, times) if not module.flat else module.name,
            matrix,
            (module.b.shape[0], *module.a.shape[1:]),
            module.rank,
            dtype,
            module.embedding,
            module.component,
            module.flat,
            module.prefix,
            times,
        )

    def close(self) -> None:
        self._source.close()


class BoundUpdates:
    """Of any adapter on its base, modules by the names of the base's tensors.

    An update that is not given by factors is computed whole and decomposed, so its rank may be as large as the
    matrix.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, options: BindOptions) -> None:
        self.adapter = adapter
        self._base = base
        self._options = options
        self._binding = adapter.bind(base, options)
        # a head that is untied only because the embedding changes has no update of its own
        self.names: Collection[str] = [
            name for name, patch in self._binding.items() if not isinstance(patch, KeepPatch)
        ]
        for target in self.names:
            _check(target, self._binding[target], adapter)
        self._factors = open_reader(adapter.checkpoint)
        self._weights = open_reader(base)

    def load(self, name: str) -> Update:
        import torch

        from mergekit_px.kernels.low_rank import LowRank
        from mergekit_px.kernels.svd import truncated_svd

        patch = self._binding[name]
        factors = {role: read_tensor(self._factors, tensor) for role, tensor in patch.factors.items()}
        pair = patch.low_rank(factors)
        turned = _stored_transposed(patch, self.adapter)
        if pair is not None:
            left, right = pair
            matrix = LowRank(right.T, left) if turned else LowRank(left, right.T)
        else:
            assert patch.source is not None  # as checked
            weight = read_tensor(self._weights, self._base.tensors[patch.source]).float()
            delta = patch.change(weight, factors).flatten(1)
            matrix = LowRank.from_svd(truncated_svd(delta.T if turned else delta, label=name))
        kernel = patch.out_shape[2:]
        shape = patch.out_shape if not turned else patch.out_shape[::-1]
        floating = [tensor.dtype for tensor in factors.values() if tensor.is_floating_point()]
        module = self._binding.modules.get(name)
        times = repeats(module, self._options) if module is not None else 1
        return Update(
            # The base has the dots that a flat name lacks.
            name.removesuffix(".weight") if module is None or module.flat else _written_name(module, times),
            matrix,
            shape if not kernel else patch.out_shape,
            matrix.rank,
            floating[0] if floating else torch.float32,
            any("embedding" in tensor.name for tensor in patch.factors.values()),
            component=None if module is None else module.component,
            prefix=None if module is None else module.prefix,
            repeats=times,
        )

    def close(self) -> None:
        self._factors.close()
        self._weights.close()


_BASE = "give the base model with --base"


def _written_name(module: Module, times: int) -> str:
    """The module's name in the adapter that is written: an attention's output keeps PEFT's wrapper in its name where
    it is added twice, for that is what the name says."""
    return module.path if times > 1 else module.name


def _stored_transposed(patch: Patch, adapter: Adapter) -> bool:
    inner = patch.inner if isinstance(patch, DoraPatch) else patch
    if isinstance(inner, LowRankPatch):
        return inner.transposed
    return len(patch.out_shape) == 2 and adapter.config.flag("fan_in_fan_out")


def _check(target: str, patch: Patch, adapter: Adapter) -> None:
    """Raises AdapterError for what is no update of a layer's weight."""
    hint = "apply the adapters to their base and merge the models instead"
    links = patch.links if isinstance(patch, ChainPatch) else (patch,)
    if any(isinstance(link, ReplacePatch | RowsReplacedPatch) for link in links):
        raise adapter.config.error(f"{shown(target)} is replaced, not changed by a low-rank update", hint=hint)
    if isinstance(patch, ExpertsPatch | ExpertSlicePatch):
        raise adapter.config.error(f"{shown(target)} belongs to stacked experts", hint=hint)
    if len(patch.out_shape) < 2 or not math.prod(patch.out_shape):
        raise adapter.config.error(f"{shown(target)} is not a matrix", hint=hint)
