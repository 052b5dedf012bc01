"""The teacher: the sources' predictions, averaged, as much of them as has to be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.learn.data import COUNTED, TEACHER, TEACHER_CLASSES, Examples, to_device
from mergekit_px.learn.ofasd.blend import Blend
from mergekit_px.learn.ofasd.objective import counted, kept_log_probabilities
from mergekit_px.learn.ofasd.settings import CoefficientSettings
from mergekit_px.learn.outputs import predict

MOST_CLASSES = 1024
"""Up to so many classes all of a prediction is kept."""
KEPT_CLASSES = 128
"""Of more classes, the likeliest are kept one by one and all others as one: a vocabulary's predictions for a data set
do not fit anywhere."""
MOST_BYTES = 2**28
"""Of logits that wait for the other sources. More data than that is gone through in turns of all sources."""


@dataclass(frozen=True)
class Ensemble:
    """Predictions of the sources together.

    Attributes:
        arrays: ``TEACHER``, log-probabilities of the mean at the temperature, (examples, ..., classes), float32; of the
            ``TEACHER_CLASSES`` in falling order and of all others together, where there are too many.
        best: its best class for each prediction, (examples, ...).
        predictions: for each source its best classes, (examples, ...).
        agreement: mean percent of a source's predictions that are those of the ensemble.
        entropy: mean, in nats, at the temperature; of what is kept.
        kept: mean probability of the classes that are kept one by one.
    """

    arrays: dict[str, Tensor]
    best: Tensor
    predictions: tuple[Tensor, ...]
    agreement: float
    entropy: float
    kept: float


@torch.no_grad()
def ensemble(
    blend: Blend,
    module: nn.Module,
    data: Examples,
    shares: Sequence[float],
    settings: CoefficientSettings,
    device: torch.device,
) -> Ensemble:
    """Run every source over the data once; the model holds the last of them afterwards.

    Args:
        shares: of the sources in the average; they add up to 1.
    """
    shape, places = data.arrays[COUNTED].shape, data.arrays[COUNTED]
    best = torch.zeros(shape, dtype=torch.int32)
    predictions = [torch.zeros(shape, dtype=torch.int32) for _ in shares]
    arrays: dict[str, Tensor] = {}
    uncertainty, kept = 0.0, 0.0
    for part in _turns(blend, module, data, settings, device):
        total: Tensor | None = None
        rows = places.clone()
        rows[: part.start] = False
        rows[part.stop :] = False
        for index, share in enumerate(shares):
            alone = torch.zeros(len(shares), len(blend.blocks.names), dtype=torch.float64)
            alone[index] = 1.0
            blend.assemble(alone)
            logits = _logits(blend, module, data.take(torch.arange(part.start, part.stop)), settings, device)
            predictions[index][rows] = logits.argmax(dim=-1).int()
            if settings.teacher == "probabilities":
                logits = functional.softmax(logits / settings.temperature, dim=-1)
            total = logits.mul_(share) if total is None else total.add_(logits, alpha=share)
            del logits
        assert total is not None
        if settings.teacher == "probabilities":
            total = total.clamp_(min=torch.finfo(total.dtype).tiny).log_()
        else:
            total = total.div_(settings.temperature)
        best[rows] = total.argmax(dim=-1).int()
        classes = total.topk(KEPT_CLASSES).indices if total.shape[-1] > MOST_CLASSES else None
        said = kept_log_probabilities(total, classes)
        _put(arrays, TEACHER, said, rows)
        if classes is not None:
            _put(arrays, TEACHER_CLASSES, classes.int(), rows)
            kept -= float(said[:, -1].exp().double().sum())
        kept += len(said)
        uncertainty -= float((said.exp() * said).double().sum())
    count = int(places.sum())
    same = [float((one[places] == best[places]).double().mean()) for one in predictions]
    return Ensemble(
        arrays, best, tuple(predictions), 100 * sum(same) / len(same), uncertainty / count, min(kept / count, 1.0)
    )


def _turns(
    blend: Blend, module: nn.Module, data: Examples, settings: CoefficientSettings, device: torch.device
) -> Iterator[range]:
    """Rows of the data, as many at a time as may wait: whole batches."""
    blend.assemble(torch.zeros(blend.source_count, len(blend.blocks.names), dtype=torch.float64))
    sample = to_device(data.take(torch.arange(1)).arrays, device, blend.sites[0].target.dtype)
    bytes_for_example = 4 * predict(module, sample, settings.precision).numel()
    batches = max(1, MOST_BYTES // max(1, bytes_for_example * settings.batch))
    step = batches * settings.batch
    for start in range(0, len(data), step):
        yield range(start, min(start + step, len(data)))


def _logits(
    blend: Blend, module: nn.Module, data: Examples, settings: CoefficientSettings, device: torch.device
) -> Tensor:
    """(n, classes), float32, on the CPU: of the predictions that count."""
    batches = (to_device(batch, device, blend.sites[0].target.dtype) for batch in data.batches(settings.batch))
    return torch.cat([counted(predict(module, batch, settings.precision), batch).float().cpu() for batch in batches])


def _put(arrays: dict[str, Tensor], name: str, values: Tensor, rows: Tensor) -> None:
    """Values of the predictions that count, at their places in an array for all."""
    if name not in arrays:
        arrays[name] = torch.zeros((*rows.shape, values.shape[-1]), dtype=values.dtype)
    arrays[name][rows] = values
