"""The teacher: the sources' predictions, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.learn.data import Examples, to_device
from mergekit_px.learn.ofasd.blend import Blend
from mergekit_px.learn.ofasd.objective import agreement, predict
from mergekit_px.learn.ofasd.settings import Settings


@dataclass(frozen=True)
class Ensemble:
    """Predictions of the sources together.

    Attributes:
        log_probabilities: of the mean at the temperature, (examples, ..., classes), float32.
        predictions: for each source its best classes, (examples, ...).
        agreement: mean percent of a source's predictions that are those of the ensemble.
        entropy: mean, in nats, at the temperature.
    """

    log_probabilities: Tensor
    predictions: tuple[Tensor, ...]
    agreement: float
    entropy: float


@torch.no_grad()
def ensemble(
    blend: Blend, module: nn.Module, data: Examples, shares: Sequence[float], settings: Settings, device: torch.device
) -> Ensemble:
    """Run every source over the data once; the model holds the last of them afterwards.

    Args:
        shares: of the sources in the mean; they add up to 1.
    """
    dtype = blend.sites[0].base.dtype
    columns = len(blend.blocks.names)
    total: Tensor | None = None
    predictions = []
    for index, share in enumerate(shares):
        alone = torch.zeros(len(shares), columns, dtype=torch.float64)
        alone[index] = 1.0
        blend.assemble(alone)
        batches = (to_device(batch, device, dtype) for batch in data.batches(settings.batch))
        logits = torch.cat([predict(module, batch, settings.precision).float().cpu() for batch in batches])
        predictions.append(logits.argmax(dim=-1))
        if settings.teacher == "probabilities":
            logits = functional.softmax(logits / settings.temperature, dim=-1)
        total = logits * share if total is None else total.add_(logits, alpha=share)
    assert total is not None
    if settings.teacher == "probabilities":
        log_probabilities = total.clamp_(min=torch.finfo(total.dtype).tiny).log_()
    else:
        log_probabilities = functional.log_softmax(total / settings.temperature, dim=-1)
    best = log_probabilities.argmax(dim=-1)
    same = [float((one == best).double().mean()) for one in predictions]
    uncertainty = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    return Ensemble(log_probabilities, tuple(predictions), 100 * sum(same) / len(same), float(uncertainty))


def accuracy(log_probabilities: Tensor, labels: Tensor, ignored: int) -> float:
    """Percent of the labels, ignored ones aside, that have the highest probability."""
    counted = labels != ignored
    return agreement(log_probabilities[counted], functional.one_hot(labels[counted], log_probabilities.shape[-1]))
