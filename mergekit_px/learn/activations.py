"""Activations that are computed again in the backward pass instead of being kept: those inside of a model's layers.

The layers are the members of its lists (``nn.ModuleList``, ``nn.Sequential``), whatever the model is. The switch that
``transformers`` has works in training mode alone, in which dropout works too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mergekit_px.errors import UsageError


def checkpoint_activations(module: nn.Module) -> None:
    """Keep only what each layer takes, from now on.

    Raises:
        UsageError: no list of layers.
    """
    layers = list(layers_of(module))
    if not layers:
        raise UsageError(
            f"{type(module).__name__} has no list of layers whose activations could be computed again",
            hint="leave --checkpoint-activations out, or use smaller batches with --accumulate",
        )
    for layer in layers:
        layer.forward = partial(_again, layer.forward)


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists."""
    for child in module.children():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield child
        else:
            yield from layers_of(child)


def _again(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **named)
