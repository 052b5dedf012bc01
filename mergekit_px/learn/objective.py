"""What a model is to become good at: losses and metrics by name, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.data import BESIDE, IGNORED, LABELS, TARGETS, Batch, Examples, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.outputs import Precision, forward, logits_of, loss_of, passes
from mergekit_px.user_code import user_function

Loss = Callable[[nn.Module, Batch], Tensor]
Metric = Callable[[nn.Module, Iterable[Batch]], float]

LOSSES = ("auto", "cross_entropy", "mse")
METRICS = ("accuracy", "loss")


def loss_function(name: str, *, allow_code: bool, own_loss: bool = False) -> Loss:
    """A function of (module, batch) to a scalar; batches are as `mergekit_px.learn.labels` makes them.

    Args:
        own_loss: whether ``auto`` is the loss that the model returns.

    Raises:
        UsageError: no such name, or code that is not allowed.
    """
    if name in LOSSES:
        return lambda module, batch: _loss(name, module, batch, own_loss=own_loss)
    if ":" not in name:
        raise UsageError(f"there is no loss {name!r}", hint=f"give {', '.join(LOSSES)} or file.py:function")
    function = user_function(name, allow_code=allow_code)

    def checked(module: nn.Module, batch: Batch) -> Tensor:
        found = function(module, _as_given(batch))
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
        found = function(module, map(_as_given, batches))
        try:
            return float(found)
        except (TypeError, ValueError):
            raise UsageError(f"a metric is a number, not {type(found).__name__}", where=name) from None

    return checked


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not left out; 0 where all are."""
    if not bool((targets != IGNORED).any()):
        return logits.sum() * 0.0
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def right_predictions(logits: Tensor, targets: Tensor) -> int:
    """How many of the targets, ignored ones aside, have the highest logit."""
    return int(((logits.argmax(dim=-1) == targets) & (targets != IGNORED)).sum())


def _as_given(batch: Batch) -> Batch:
    """Without what only learners need: the code of users sees inputs and labels."""
    return {name: array for name, array in batch.items() if name == LABELS or name not in BESIDE}


def _loss(name: str, module: nn.Module, batch: Batch, *, own_loss: bool) -> Tensor:
    own_loss = own_loss and name == "auto"
    output = forward(module, batch, with_labels=own_loss)
    if own_loss and (own := loss_of(output)) is not None:
        return own
    logits, targets = logits_of(output), batch[TARGETS]
    if name == "mse" or (name == "auto" and targets.is_floating_point()):
        return functional.mse_loss(logits.reshape(targets.shape), targets.to(logits.dtype))
    return cross_entropy(logits, targets)


def _accuracy(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of the labels (ignored ones aside) that have the highest logit."""
    right, counted = 0, 0
    for batch in batches:
        if batch[TARGETS].is_floating_point():
            raise InputError("accuracy needs labels that are classes", hint="write metric: loss")
        right += right_predictions(logits_of(forward(module, batch)), batch[TARGETS])
        counted += target_count(batch)
    return 100.0 * right / counted if counted else float("nan")


def _mean_loss(loss: Loss, module: nn.Module, batches: Iterable[Batch]) -> float:
    """Over all labels that count, however they are spread over batches."""
    total, counted = 0.0, 0
    for batch in batches:
        count = target_count(batch)
        if count:
            total += float(loss(module, batch)) * count
            counted += count
    return total / counted if counted else float("nan")


def evaluate(
    module: nn.Module,
    data: Examples,
    batch: int,
    device: torch.device,
    precision: Precision = "float32",
    *,
    own_loss: bool = False,
) -> dict[str, float]:
    """Mean loss, and percent of right labels where labels are classes."""
    loss = loss_function("auto", allow_code=False, own_loss=own_loss)
    names = ["loss"] if data.arrays[TARGETS].is_floating_point() else ["loss", "accuracy"]
    with torch.no_grad(), passes(device, precision):
        return {
            name: metric_function(name, loss, allow_code=False)(
                module, (to_device(one, device, torch.float32) for one in data.batches(batch))
            )
            for name in names
        }
