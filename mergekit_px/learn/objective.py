"""What a model is to become good at: losses and metrics by name, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.data import IGNORED, LABELS, Batch, forward_names, require_arguments
from mergekit_px.learn.models import user_function

Loss = Callable[[nn.Module, Batch], Tensor]
Metric = Callable[[nn.Module, Iterable[Batch]], float]

LOSSES = ("auto", "cross_entropy", "mse")
METRICS = ("accuracy", "loss")


def loss_function(name: str, *, allow_code: bool) -> Loss:
    """A function of (module, batch) to a scalar.

    Raises:
        UsageError: no such name, or code that is not allowed.
    """
    if name in LOSSES:
        return lambda module, batch: _loss(name, module, batch)
    if ":" not in name:
        raise UsageError(f"there is no loss {name!r}", hint=f"give {', '.join(LOSSES)} or file.py:function")
    function = user_function(name, allow_code=allow_code)

    def checked(module: nn.Module, batch: Batch) -> Tensor:
        found = function(module, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise UsageError("a loss is a tensor with one value", where=name)
        return found.reshape(())

    return checked


def metric_function(name: str, loss: Loss, *, allow_code: bool) -> Metric:
    """A function of (module in evaluation mode, batches) to a number.

    Raises:
        UsageError: no such name, or code that is not allowed.
    """
    if name == "accuracy":
        return _accuracy
    if name == "loss":
        return lambda module, batches: _mean_loss(loss, module, batches)
    if ":" not in name:
        raise UsageError(f"there is no metric {name!r}", hint=f"give {', '.join(METRICS)} or file.py:function")
    function = user_function(name, allow_code=allow_code)

    def checked(module: nn.Module, batches: Iterable[Batch]) -> float:
        found = function(module, batches)
        try:
            return float(found)
        except (TypeError, ValueError):
            raise UsageError(f"a metric is a number, not {type(found).__name__}", where=name) from None

    return checked


def forward(module: nn.Module, batch: Batch) -> Any:
    """The module's output for a batch; labels are passed on where its forward pass names them."""
    names, _, _ = forward_names(module)
    given = {name: array for name, array in batch.items() if name != LABELS or LABELS in names}
    return module(**given)


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


def check_fit(module: nn.Module, batch: Batch, where: str, *, reads_logits: bool) -> int | None:
    """Try a batch: do its arrays suit the forward pass, and its labels the outputs?

    Args:
        batch: a few examples, on the device of the module.
        reads_logits: whether a built-in loss or metric compares logits with labels.

    Returns:
        the number of classes, for labels that are classes of logits. A label beyond them would stop a CUDA device
        for good, so it is to be looked for (`require_classes`) before any loss is computed.

    Raises:
        InputError: names, shapes or labels that do not fit.
    """
    require_arguments(module, batch, where)
    if not reads_logits:
        return None
    inputs = {name: array for name, array in batch.items() if name != LABELS}
    given = batch if LABELS in forward_names(module)[1] else inputs
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(**given)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in inputs.items())
        lines = str(error).splitlines() or [type(error).__name__]
        what = f"the model cannot take the arrays ({shapes} for an example): {lines[0]}"
        raise InputError(what, where=where) from error
    finally:
        module.train(was_training)
    logits = _logits_of_head(module, output, where)
    labels = batch[LABELS]
    if labels.is_floating_point():
        return None
    if logits.ndim < 2 or logits.shape[:-1] != labels.shape:
        raise InputError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}", where=where
        )
    return int(logits.shape[-1])


def _logits_of_head(module: nn.Module, output: Any, where: str) -> Tensor:
    try:
        return logits_of(output)
    except InputError:
        last = ", ".join(list(module.state_dict())[-2:])
        raise InputError(
            f"{type(module).__name__} has no head that scores classes: it returned {type(output).__name__} without"
            f" logits, and its last tensors are {last}",
            where=where,
            hint="give a checkpoint with a head, whose config.json names the class that has it",
        ) from None


def _loss(name: str, module: nn.Module, batch: Batch) -> Tensor:
    output = forward(module, batch)
    if name == "auto":
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
    logits, labels = logits_of(output), batch[LABELS]
    if name == "mse" or (name == "auto" and labels.is_floating_point()):
        return functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _accuracy(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of the labels (ignored ones aside) that have the highest logit."""
    right, counted = 0, 0
    for batch in batches:
        labels = batch[LABELS]
        if labels.is_floating_point():
            raise InputError("accuracy needs labels that are classes", hint="write metric: loss")
        found = logits_of(forward(module, batch)).argmax(dim=-1)
        right += int(((found == labels) & (labels != IGNORED)).sum())
        counted += int((labels != IGNORED).sum())
    return 100.0 * right / counted if counted else float("nan")


def _mean_loss(loss: Loss, module: nn.Module, batches: Iterable[Batch]) -> float:
    total, counted = 0.0, 0
    for batch in batches:
        total += float(loss(module, batch)) * len(batch[LABELS])
        counted += len(batch[LABELS])
    return total / counted if counted else float("nan")
