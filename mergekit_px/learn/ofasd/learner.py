"""The loop: a backward pass, dot products with the task vectors, a step of the coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.errors import DivergedError
from mergekit_px.learn.data import COUNTED, TARGETS, Batch, Examples, shuffled, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.life import Tell
from mergekit_px.learn.objective import cross_entropy, right_predictions
from mergekit_px.learn.ofasd.batch_norm import batch_norms, batch_statistics, reestimate
from mergekit_px.learn.ofasd.blend import Blend
from mergekit_px.learn.ofasd.objective import counted, distillation_from, entropy, penalty
from mergekit_px.learn.ofasd.settings import CoefficientSettings
from mergekit_px.learn.optimizer import take_step
from mergekit_px.learn.outputs import predict
from mergekit_px.learn.state import load_state, save_state

_UNFIT = 1000.0
"""Added to the score of coefficients that hurt the control data too much: worse than any that do not."""


@dataclass
class Course:
    """How far learning has come; all of it is in a saved state.

    Attributes:
        values: coefficients, float64, (sources, blocks).
        best: those with the lowest score so far.
        trace: (step, mean loss since the entry before, score on the validation data).
    """

    values: Tensor
    best: Tensor
    best_score: float = math.inf
    best_step: int = 0
    step: int = 0
    waited: int = 0
    trace: list[tuple[int, float | None, float]] = field(default_factory=list)


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
        self.course = Course(initial.clone(), initial.clone())
        self._parts = parts
        self._initial = initial
        self._learned = torch.tensor(blend.blocks.learned)
        self._device = device
        self._dtype = blend.sites[0].base.dtype
        self._estimates = settings.batch_norm == "reestimate" and bool(batch_norms(module))
        self._stream = shuffled(parts["train"], settings.batch, settings.seed, "train")
        self._control = (
            shuffled(parts["control"], settings.batch, settings.seed, "control") if "control" in parts else None
        )
        self._values = nn.Parameter(self.course.values)
        assert settings.learning_rate is not None and settings.weight_decay is not None
        self._optimizer = torch.optim.AdamW(
            [self._values], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._control_goal: float | None = None

    def run(self, state: Path, plan_hash: str, tell: Tell) -> Course:
        """Learn, or go on from a saved state; the best coefficients are in the result.

        Raises:
            DivergedError: a loss that is not finite; ``course`` holds the best coefficients before it.
            OutputError: the state is of other inputs or settings.
        """
        assert self.settings.steps is not None
        self._set_control_goal()
        if state.exists():
            self._restore(state, plan_hash)
        else:
            self.blend.assemble(self.course.values)
            self._look(None)
        course = self.course
        while course.step < self.settings.steps and course.waited < self.settings.patience:
            losses = []
            for _ in range(min(self.settings.evaluate_every, self.settings.steps - course.step)):
                losses.append(self.learn())
                tell("step", course.step, self.settings.steps, losses[-1])
            self._look(math.fsum(losses) / len(losses))
            self._save(state, plan_hash)
        return course

    def learn(self) -> float:
        """One step on the next batch; returns the loss. Raises ``DivergedError``."""
        course = self.course
        self.module.zero_grad(set_to_none=True)
        with batch_statistics(self.module) if self._estimates else nullcontext():
            loss = self.loss(self._moved(self._stream.next()))
            if self._control is not None:
                control = self._moved(self._control.next())
                loss = cross_entropy(self.predict(control), control[TARGETS]) - loss
            settings = self.settings
            extra, slope = penalty(course.values, self._initial, self._learned, settings.penalty, settings.penalty_norm)
            value = float(loss.detach()) + extra
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} at step {course.step}")
            loss.backward()
        gradient = (self.blend.gradient() + slope) * self._learned
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient is not finite at step {course.step}")
        if settings.clip is not None and norm > settings.clip:
            gradient *= settings.clip / norm
        self._apply(gradient)
        course.step += 1
        self.blend.assemble(course.values)
        return value

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the model as it is, in the precision of the settings."""
        return predict(self.module, batch, self.settings.precision)

    def loss(self, batch: Batch) -> Tensor:
        """The objective on a batch, without the penalty; for negation the loss that is to grow."""
        logits = self.predict(batch)
        if self.settings.objective == "entropy":
            return entropy(counted(logits, batch))
        if self.settings.objective != "distill":
            return cross_entropy(logits, batch[TARGETS])
        share = self.settings.label_share or 0.0
        loss = logits.sum() * 0.0
        if share < 1:
            loss = loss + (1 - share) * distillation_from(batch, counted(logits, batch), self.settings.temperature)
        return loss + share * cross_entropy(logits, batch[TARGETS]) if share > 0 else loss

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

    def _apply(self, gradient: Tensor) -> None:
        """A step of AdamW on a cosine schedule (constant for the entropy), within the bounds.

        Raises ``DivergedError`` where a coefficient leaves the range of the model's dtype.
        """
        settings, course = self.settings, self.course
        assert settings.learning_rate is not None and settings.steps is not None
        fall = 1.0 if settings.objective == "entropy" else 0.5 * (1 + math.cos(math.pi * course.step / settings.steps))
        self._optimizer.param_groups[0]["lr"] = settings.learning_rate * fall
        self._values.grad = gradient
        take_step(self._optimizer, f"at step {course.step}")
        with torch.no_grad():
            if settings.bounds is not None:
                self._values.clamp_(*settings.bounds)
            course.values = torch.where(self._learned, self._values.detach(), self._initial)
        if not bool(course.values.to(self._dtype).isfinite().all()):
            raise DivergedError(f"a coefficient is not finite after step {course.step}")

    def _look(self, loss: float | None) -> None:
        """Score the coefficients on the validation data and keep them if they are the best."""
        course = self.course
        self.settle(course.values)
        score = self._score()
        course.trace.append((course.step, loss, score))
        if score < course.best_score:
            course.best, course.best_score = course.values.clone(), score
            course.best_step, course.waited = course.step, 0
        else:
            course.waited += 1

    @torch.no_grad()
    def _score(self) -> float:
        """Lower is better: the loss, or for negation the accuracy on what is to be forgotten, if the control holds."""
        if self._control_goal is not None:
            kept = self._accuracy("control_validation")
            lacking = max(self._control_goal - kept, 0.0)
            return self._accuracy("validation") + (_UNFIT + lacking if lacking else 0.0)
        total, count = 0.0, 0
        by_label = self.settings.objective == "cross-entropy"
        for batch in self.batches("validation"):
            weight = target_count(batch) if by_label else int(batch[COUNTED].sum())
            total += float(self.loss(batch)) * weight
            count += weight
        return total / count if count else math.nan

    def _set_control_goal(self) -> None:
        if self._control is not None:
            self.settle(torch.zeros_like(self._initial))
            self._control_goal = self.settings.control_share * self._accuracy("control_validation")

    @torch.no_grad()
    def _accuracy(self, part: str) -> float:
        right, count = 0, 0
        for batch in self.batches(part):
            right += right_predictions(self.predict(batch), batch[TARGETS])
            count += target_count(batch)
        return 100.0 * right / count if count else math.nan

    def _moved(self, batch: Mapping[str, Tensor]) -> Batch:
        return to_device(batch, self._device, self._dtype)

    def _save(self, path: Path, plan_hash: str) -> None:
        course = self.course
        moments = self._optimizer.state_dict()["state"][0]
        tensors = {"values": self._values.detach(), "best": course.best, **moments}
        info: dict[str, Any] = {
            "plan_hash": plan_hash,
            "best_score": course.best_score,
            "best_step": course.best_step,
            "step": course.step,
            "waited": course.waited,
            "trace": course.trace,
            "place": self._stream.place,
            "control_place": self._control.place if self._control is not None else None,
        }
        save_state(path, tensors, info)

    def _restore(self, path: Path, plan_hash: str) -> None:
        tensors, info = load_state(path, plan_hash)
        with torch.no_grad():
            self._values.copy_(tensors.pop("values"))
        self.course = Course(
            values=torch.where(self._learned, self._values.detach(), self._initial),
            best=tensors.pop("best"),
            best_score=info["best_score"],
            best_step=info["best_step"],
            step=info["step"],
            waited=info["waited"],
            trace=[(step, loss, score) for step, loss, score in info["trace"]],
        )
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": {0: tensors}})
        self._stream.seek(tuple(info["place"]))
        if self._control is not None:
            self._control.seek(tuple(info["control_place"]))
        self.blend.assemble(self.course.values)
