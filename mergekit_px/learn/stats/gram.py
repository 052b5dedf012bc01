"""Gram matrices of the inputs of linear layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.learn.data import Batch, Examples, to_device
from mergekit_px.learn.labels import real_rows
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.outputs import Precision, forward, passes
from mergekit_px.learn.stats.sums import Tensors, require_finite


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is (in, out): the ``Conv1D`` of GPT-2 and its like."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


class GramSums:
    """``E x x'`` of the inputs x of every ``nn.Linear``, by the name of its weight in the checkpoint.

    The mean is over all rows that the layer sees (examples, and tokens in them); positions that an
    ``attention_mask`` of the data leaves out do not count. (n, n) float32 on the CPU, added up in float64.

    Args:
        transposed: and of linear layers whose weights are (in, out).
    """

    def __init__(
        self,
        model: LearningModel,
        *,
        batch: int,
        device: torch.device,
        precision: Precision,
        transposed: bool = False,
    ) -> None:
        self.batch = batch
        self._module = model.module
        self._device = device
        self._precision = precision
        names: dict[int, list[str]] = {}
        for name in model.names:
            names.setdefault(id(model.tensor(name)), []).append(name)
        linear = [
            module
            for module in model.module.modules()
            if isinstance(module, nn.Linear) or (transposed and is_transposed(module))
        ]
        weights = [(module, names.get(id(module._parameters["weight"]), [])) for module in linear]
        self._names = {module: found for module, found in weights if found}
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._batch: Batch = {}

    def of(self, layers: Collection[nn.Module]) -> GramSums:
        """Sums of some of the layers, with nothing in them yet."""
        found = copy.copy(self)
        found._names = {module: names for module, names in self._names.items() if module in layers}
        found._sums, found._rows = {}, {}
        return found

    @torch.no_grad()
    def add(self, number: int, examples: Examples) -> None:
        """Add a batch."""
        moved = to_device(examples.arrays, self._device, torch.float32)
        self._batch = moved
        hooks = [module.register_forward_pre_hook(self._add) for module in self._names]
        try:
            with passes(self._device, self._precision):
                forward(self._module, moved)
        finally:
            for hook in hooks:
                hook.remove()

    def state(self) -> Tensors:
        """The sums so far, themselves, and the rows that they are of."""
        rows = {f"rows.{name}": torch.tensor(count) for name, count in self._rows.items()}
        return rows | {f"sum.{name}": total for name, total in self._sums.items()}

    def restore(self, state: Tensors) -> None:
        """Go on from sums that `state` gave."""
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "rows":
                self._rows[name] = int(value)
            else:
                self._sums[name] = value.to(self._device)

    def means(self) -> Tensors:
        """The matrices. Raises ``NonFiniteError`` where one is not finite."""
        means = {
            first: require_finite((total / max(self._rows[first], 1)).float().cpu(), first)
            for first, total in self._sums.items()
        }
        return {name: means[names[0]] for names in self._names.values() if names[0] in means for name in names}

    def _add(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        name = self._names[module][0]
        inputs = arguments[0].detach()
        seen = real_rows(inputs, self._batch).double()
        product = seen.T @ seen
        self._sums[name] = self._sums[name] + product if name in self._sums else product
        self._rows[name] = self._rows.get(name, 0) + len(seen)
