"""What a model says to a batch, in float32, or in bfloat16 where it was asked for.

What is trained, summed or written stays in the dtype of the model; only the products of a pass are made in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergekit_px.errors import InputError
from mergekit_px.learn.data import BESIDE, LABELS, Batch, forward_names

Precision = Literal["float32", "bfloat16"]


def passes(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Inside, forward passes are in that precision (torch's autocast); backward passes follow them of themselves."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def forward(module: nn.Module, batch: Batch, *, with_labels: bool = False) -> Any:
    """The module's output for a batch.

    Labels go to a forward pass that cannot do without, or, with ``with_labels``, to one that names them: what they
    belong to is settled outside of the model.
    """
    names, required, _ = forward_names(module)
    passed = LABELS in (names if with_labels else required)
    given = {name: array for name, array in batch.items() if (passed if name == LABELS else name not in BESIDE)}
    return module(**given)


def predict(module: nn.Module, batch: Batch, precision: Precision = "float32") -> Tensor:
    """Logits, shape (..., classes), float32 at least."""
    with passes(next(iter(batch.values())).device, precision):
        return logits_of(forward(module, batch))


def logits_of(output: Any) -> Tensor:
    """The scores in what a forward pass returned: a tensor, or its ``logits``, or its first part; float32 at least.

    Raises:
        InputError: none of these.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returned {type(output).__name__} without logits", hint="give a loss of yours: file.py:function"
        )
    return found.float() if found.element_size() < 4 else found


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a forward pass returned, if there is one."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None
