"""What coefficients are learned by: distillation, labels, certainty."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mergekit_px.learn.data import COUNTED, TEACHER, TEACHER_CLASSES, Batch


def counted(values: Tensor, batch: Batch) -> Tensor:
    """(n, ...): what belongs to the predictions that count, of padding and prompts nothing."""
    return values[batch[COUNTED]]


def kept_log_probabilities(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Log-probabilities, (n, classes); where some classes are named, theirs and that of all others together."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    if classes is None:
        return log_probabilities
    classes = classes.long()
    kept = log_probabilities.gather(-1, classes)
    others = log_probabilities.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([kept, others], dim=-1)


def distillation_from(batch: Batch, predictions: Tensor, temperature: float) -> Tensor:
    """The `distillation` of the predictions that count from what the teacher said of them; 0 where none counts."""
    if not len(predictions):
        return predictions.sum() * 0.0
    classes = counted(batch[TEACHER_CLASSES], batch) if TEACHER_CLASSES in batch else None
    return distillation(predictions, counted(batch[TEACHER], batch), temperature, classes)


def best_of_teacher(batch: Batch) -> Tensor:
    """The teacher's best class for each prediction that counts."""
    if TEACHER_CLASSES in batch:  # in falling order
        return counted(batch[TEACHER_CLASSES], batch)[..., 0].long()
    return counted(batch[TEACHER], batch).argmax(dim=-1)


def distillation(logits: Tensor, teacher: Tensor, temperature: float, classes: Tensor | None = None) -> Tensor:
    """``T^2 KL(q_T || p_T)``, mean over predictions (Hinton et al., arXiv 1503.02531).

    Args:
        logits: of the student, (..., classes).
        teacher: log q_T of the same shape; or of some classes, and of all others together.
        classes: which these are; None for all.
    """
    student = kept_log_probabilities(logits / temperature, classes).flatten(0, -2)
    return temperature**2 * functional.kl_div(student, teacher.flatten(0, -2), reduction="batchmean", log_target=True)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions, in nats (AdaMerging, arXiv 2310.02575)."""
    if not logits.shape[0]:
        return logits.sum() * 0.0
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def penalty(values: Tensor, initial: Tensor, learned: Tensor, factor: float, norm: int) -> Tensor | float:
    """``factor * mean |c - c_initial|^p`` over the coefficients that learn."""
    if not factor:
        return 0.0
    offset = (values - initial) * learned
    return factor * offset.abs().pow(norm).sum() / max(int(learned.sum()) * len(values), 1)
