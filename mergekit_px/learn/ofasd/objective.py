"""What coefficients are learned by: distillation, labels, certainty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.learn.data import IGNORED, LABELS, Batch, forward_names
from mergekit_px.learn.objective import logits_of
from mergekit_px.learn.precision import Precision, passes

TEACHER = "teacher log-probabilities"
"""An array beside the data: no forward pass has an argument of that name."""


def predict(module: nn.Module, batch: Batch, precision: Precision = "float32") -> Tensor:
    """Logits, shape (..., classes), float32 at least."""
    required = forward_names(module)[1]
    inputs = {name: array for name, array in batch.items() if name in required or _is_input(name)}
    with passes(next(iter(inputs.values())).device, precision):
        return logits_of(module(**inputs))


def _is_input(name: str) -> bool:
    return name not in (LABELS, TEACHER)


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(q_T || p_T)``, mean over examples (Hinton et al., arXiv 1503.02531).

    Args:
        logits: of the student, (..., classes).
        teacher: log q_T of the same shape.
    """
    student = functional.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * functional.kl_div(student, teacher.flatten(0, -2), reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not left out; 0 where all are."""
    if not bool((labels != IGNORED).any()):
        return logits.sum() * 0.0
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions, in nats (AdaMerging, arXiv 2310.02575)."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def penalty(values: Tensor, initial: Tensor, learned: Tensor, factor: float, norm: int) -> tuple[float, Tensor]:
    """``factor * mean |c - c_initial|^p`` over the coefficients that learn, and its gradient."""
    offset = (values - initial) * learned
    count = max(int(learned.sum()) * len(values), 1)
    value = factor * float(offset.abs().pow(norm).sum()) / count
    slope = offset.sign() if norm == 1 else norm * offset
    return value, factor * slope / count


@torch.no_grad()
def agreement(first: Tensor, second: Tensor) -> float:
    """Percent of the predictions with the same best class; shapes (..., classes)."""
    return 100.0 * float((first.argmax(dim=-1) == second.argmax(dim=-1)).double().mean())
