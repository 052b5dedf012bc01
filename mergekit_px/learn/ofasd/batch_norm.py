"""Batch normalisation in a merged model: its running statistics are not sums of those of the sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_px.learn.data import Batch
from mergekit_px.learn.outputs import Precision, predict


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that keep running statistics, by name."""
    return {
        name: one for name, one in module.named_modules() if isinstance(one, _BatchNorm) and one.track_running_stats
    }


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms use the statistics of each batch and leave the running ones alone; all else is in evaluation mode."""
    norms = batch_norms(module).values()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


@torch.no_grad()
def reestimate(module: nn.Module, batches: Iterable[Batch], precision: Precision = "float32") -> None:
    """Replace running statistics by their mean over the batches, in one pass; batch norms evaluate after it."""
    norms = batch_norms(module).values()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    try:
        for batch in batches:
            predict(module, batch, precision)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
