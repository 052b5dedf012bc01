"""What coefficients are trained by: the objective, the choice, and how the model follows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_px.errors import DivergedError
from mergekit_px.learn.data import COUNTED, TARGETS, Batch, BatchStream, Examples, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.life import Tell
from mergekit_px.learn.objective import cross_entropy, right_predictions
from mergekit_px.learn.ofasd.batch_norm import batch_norms, batch_statistics, reestimate
from mergekit_px.learn.ofasd.blend import Blend
from mergekit_px.learn.ofasd.entrywise import EntrywiseAdamW
from mergekit_px.learn.ofasd.objective import counted, distillation_from, entropy, penalty
from mergekit_px.learn.ofasd.settings import CoefficientSettings
from mergekit_px.learn.outputs import predict
from mergekit_px.learn.training import Loss, Progress, Schedule, Scores, Training, label_share, step_batches

_UNFIT = 1000.0
"""Added to the score of coefficients that hurt the control data too much: worse than any that do not."""


class Learner:
    """Learns the coefficients of one granularity.

    Args:
        module: whose parameters the blend sets; on the device.
        parts: ``train`` and ``validation``, and for negation ``control`` and ``control_validation``.
        initial: coefficients to begin with, float64, (sources, blocks).
        settings: filled.
    """

    def __init__(
        self,
        blend: Blend,
        module: nn.Module,
        parts: Mapping[str, Examples],
        initial: Tensor,
        settings: CoefficientSettings,
        device: torch.device,
    ) -> None:
        self.blend = blend
        self.module = module.eval()
        self.settings = settings
        self._parts = parts
        self._initial = initial
        self._learned = torch.tensor(blend.blocks.learned)
        self._device = device
        self._dtype = blend.sites[0].target.dtype
        self._estimates = settings.batch_norm == "reestimate" and bool(batch_norms(module))
        self.values = nn.Parameter(initial.clone())
        """The coefficients; after learning those that were best."""
        self._control_goal: float | None = None
        assert settings.learning_rate is not None and settings.weight_decay is not None and settings.steps is not None
        self._optimizer = EntrywiseAdamW(self.values, settings.learning_rate, settings.weight_decay)
        self.training = Training(
            {"values": self.values},
            [(self._stream(part), loss) for part, loss in self._losses()],
            self._score,
            Schedule(
                settings.steps,
                settings.evaluate_every,
                settings.learning_rate,
                settings.weight_decay,
                settings.clip,
                cosine=settings.objective != "entropy",
                patience=settings.patience,
            ),
            batch=settings.batch,
            device=device,
            dtype=self._dtype,
            penalty=lambda: penalty(self.values, initial, self._learned, settings.penalty, settings.penalty_norm),
            after_step=self._after_step,
            context=lambda: batch_statistics(self.module) if self._estimates else nullcontext(),
            optimizer=self._optimizer,
        )

    @property
    def best(self) -> Tensor:
        """The coefficients with the lowest score so far."""
        return self.training.best["values"]

    def run(self, state: Path, identity: str, tell: Tell) -> Progress:
        """Learn, or go on from a saved state.

        Raises:
            DivergedError: a loss that is not finite; ``values`` are the best before it.
            OutputError: the state is of other inputs or settings.
        """
        if "control" in self._parts:
            self.settle(torch.zeros_like(self._initial))
            self._control_goal = self.settings.control_share * self._accuracy("control_validation")
        self.blend.assemble(self.values.detach())
        with self.blend.gradients(self.values, self.advance):
            return self.training.run(state, identity, tell)

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the model as it is, in the precision of the settings."""
        return predict(self.module, batch, self.settings.precision)

    def loss(self, batch: Batch, whole: Batch | None = None) -> Tensor:
        """The objective on a batch, or its share in that of a whole step, without the penalty; for negation the loss
        that is to grow."""
        whole = batch if whole is None else whole
        logits = self.predict(batch)
        of_labels = label_share(batch, whole)
        of_predictions = int(batch[COUNTED].sum()) / max(int(whole[COUNTED].sum()), 1)
        if self.settings.objective == "entropy":
            return of_predictions * entropy(counted(logits, batch))
        if self.settings.objective != "distill":
            return of_labels * cross_entropy(logits, batch[TARGETS])
        share = self.settings.label_share or 0.0
        loss = logits.sum() * 0.0
        if share < 1:
            said = distillation_from(batch, counted(logits, batch), self.settings.temperature)
            loss = loss + (1 - share) * of_predictions * said
        return loss + share * of_labels * cross_entropy(logits, batch[TARGETS]) if share > 0 else loss

    @torch.no_grad()
    def advance(self, source: int, columns: slice) -> Tensor | None:
        """Let some coefficients take their step, if their gradient is whole, and return them."""
        if not self.training.last_pass:
            return None
        self._optimizer.advance((source, columns))
        return self._bounded(self.values.detach()[source, columns])

    def settle(self, coefficients: Tensor) -> None:
        """Set the model to coefficients as it would be used: running statistics estimated anew where asked.

        The base itself keeps its own.
        """
        self.blend.assemble(coefficients)
        self.module.eval()
        if self._estimates and bool(coefficients.any()):
            reestimate(self.module, self.batches("train"), self.settings.precision)

    def batches(self, part: str) -> Iterator[Batch]:
        """The batches of a part, in order, on the device."""
        return (self._moved(batch) for batch in self._parts[part].batches(self.settings.batch))

    def _stream(self, part: str) -> BatchStream:
        return step_batches(self._parts[part], self.settings, part)

    def _losses(self) -> list[tuple[str, Loss]]:
        if "control" not in self._parts:
            return [("train", self.loss)]
        return [("train", lambda part, whole: -self.loss(part, whole)), ("control", self.loss)]

    def _after_step(self) -> None:
        """Keep within the bounds, and set the model.

        Raises ``DivergedError`` where a coefficient leaves the range of the model's dtype.
        """
        self._bounded(self.values)
        self.values.copy_(torch.where(self._learned, self.values, self._initial))
        if not bool(self.values.to(self._dtype).isfinite().all()):
            raise DivergedError(f"a coefficient is not finite after step {self.training.progress.step}")
        self.blend.assemble(self.values.detach())

    def _bounded(self, values: Tensor) -> Tensor:
        return values if self.settings.bounds is None else values.clamp_(*self.settings.bounds)

    @torch.no_grad()
    def _score(self) -> Scores:
        """The loss, or for negation the accuracy on what is to be forgotten, if the control holds."""
        self.settle(self.values.detach())
        if self._control_goal is not None:
            kept = self._accuracy("control_validation")
            lacking = max(self._control_goal - kept, 0.0)
            return {"forgotten": self._accuracy("validation") + (_UNFIT + lacking if lacking else 0.0)}
        total, count = 0.0, 0
        by_label = self.settings.objective == "cross-entropy"
        for batch in self.batches("validation"):
            weight = target_count(batch) if by_label else int(batch[COUNTED].sum())
            total += float(self.loss(batch)) * weight
            count += weight
        return {"loss": total / count if count else math.nan}

    @torch.no_grad()
    def _accuracy(self, part: str) -> float:
        right, count = 0, 0
        for batch in self.batches(part):
            right += right_predictions(self.predict(batch), batch[TARGETS])
            count += target_count(batch)
        return 100.0 * right / count if count else math.nan

    def _moved(self, batch: Mapping[str, Tensor]) -> Batch:
        return to_device(batch, self._device, self._dtype)
