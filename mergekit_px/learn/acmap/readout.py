"""Which part of what a model computes is the feature of an example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.data import Batch

Pool = Literal["first", "mean", "last"]

_BY_DEFAULT = ("last_hidden_state", "pooler_output")
"""The first token after the last layer is the paper's class token; a pooler on it was trained for something else."""
_MASK = "attention_mask"


class Readout:
    """Reads the feature out of a forward pass.

    Args:
        name: a field of the model's output, or a module of the model, whose output is read. None for the output
            itself where it is a tensor, else its ``last_hidden_state``, else its ``pooler_output``.
        pool: of features for each token (b, tokens, d): the first one's, the mean, the last one's. An attention mask
            among the inputs counts. Maps (b, channels, height, width) are always averaged over their places.
    """

    def __init__(self, module: nn.Module, name: str | None, pool: Pool) -> None:
        self._inner = dict(module.named_modules()).get(name) if name else None
        self._name = name
        self._pool = pool
        self._seen: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the output of the named module is kept as it passes."""
        if self._inner is None:
            yield
            return

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self._seen = output

        hook = self._inner.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()
            self._seen = None

    def read(self, output: Any, batch: Batch, where: str) -> Tensor:
        """(b, d) from the output of a forward pass.

        Raises:
            UsageError: the name is neither a field of the output nor a module, or was not computed.
            InputError: not features of the examples.
        """
        found = self._part(output)
        rows = len(next(iter(batch.values())))
        if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4) or len(found) != rows:
            kind = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"the feature is {kind}, for {rows} examples",
                where=where,
                hint="a feature is (examples, d), (examples, tokens, d) or (examples, channels, height, width)",
            )
        return self._pooled(found, batch.get(_MASK))

    def _part(self, output: Any) -> Any:
        if self._inner is not None:
            if self._seen is None:
                raise UsageError(
                    f"the forward pass does not use the module {shown(str(self._name))}", where="--feature"
                )
            seen, self._seen = self._seen, None
            return _default(seen)
        if self._name is None:
            return _default(output)
        fields = _fields(output)
        if self._name not in fields:
            raise UsageError(
                f"{shown(self._name)} is neither a module of the model nor in its output",
                where="--feature",
                hint=f"the output has {', '.join(fields) or 'no fields'}",
            )
        return fields[self._name]

    def _pooled(self, found: Tensor, mask: Tensor | None) -> Tensor:
        if found.ndim == 4:
            return found.mean((2, 3))
        if found.ndim == 2:
            return found
        kept = torch.ones(found.shape[:2], device=found.device) if mask is None else mask.to(found.dtype)
        if kept.shape != found.shape[:2]:
            kept = torch.ones(found.shape[:2], device=found.device)
        if self._pool == "mean":
            weights = kept / kept.sum(1, keepdim=True).clamp(min=1)
            return torch.einsum("bt,btd->bd", weights.to(found.dtype), found)
        place = kept.argmax(1) if self._pool == "first" else found.shape[1] - 1 - kept.flip(1).argmax(1)
        return found[torch.arange(len(found), device=found.device), place]


def _default(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    fields = _fields(output)
    for name in _BY_DEFAULT:
        if isinstance(fields.get(name), Tensor):
            return fields[name]
    if not fields and isinstance(output, (tuple, list)) and output:
        return output[0]
    raise InputError(
        f"the output has no {' and no '.join(_BY_DEFAULT)}",
        where="--feature",
        hint=f"name what is read: a module of the model, or one of {', '.join(fields) or 'the fields of the output'}",
    )


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    return {name: value for name, value in getattr(output, "__dict__", {}).items() if isinstance(value, Tensor)}
