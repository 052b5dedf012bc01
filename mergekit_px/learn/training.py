"""Training, whatever learns: steps that can be stopped and taken up, gradients added up over the parts of a step, the
choice by validation.

A learner gives what is free, a loss for each stream of batches and a score; all else is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mergekit_px.errors import DivergedError
from mergekit_px.learn.data import Batch, BatchStream, Examples, shuffled, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.life import Tell, silent
from mergekit_px.learn.state import StateFile, under

Loss = Callable[[Batch, Batch], Tensor]
"""Of a part of a step and the whole of it: the part's share of the loss of the whole."""
Scores = Mapping[str, float]
"""The first is what chooses; lower is better."""


class HasBatches(Protocol):
    """Settings that say what a step is made of."""

    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """How a training goes.

    Attributes:
        evaluate_every: steps between two looks at the validation data.
        clip: largest norm of the gradient; None for any.
        cosine: whether the learning rate falls to 0, or stays.
        patience: looks without gain until the end; None for all steps.
    """

    steps: int
    evaluate_every: int
    learning_rate: float
    weight_decay: float
    clip: float | None = 1.0
    cosine: bool = True
    patience: int | None = None


@dataclass
class Progress:
    """How far a training is, besides its tensors.

    Attributes:
        trace: (step, mean loss since the entry before, scores on the validation data); the first before any step.
        best_step: after which what is free was best; 0 for the start.
        waited: looks since then.
    """

    step: int = 0
    best_step: int = 0
    best_score: float = math.inf
    waited: int = 0
    trace: list[tuple[int, float | None, dict[str, float]]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)

    @property
    def ranks(self) -> list[tuple[int, float | None, float]]:
        """The trace with the score that chose alone."""
        return [(step, loss, next(iter(scores.values()))) for step, loss, scores in self.trace]


class Training:
    """AdamW on what is free; what did best on the validation data is kept.

    Args:
        free: what learns, changed in place.
        losses: streams of batches, each with the loss of its parts.
        batch: examples that go through the model together; a batch of a stream may hold several times as many.
        score: of what is free as it is.
        penalty: what is added to the loss once in a step.
        after_step: what is done to ``free`` after each step. May raise ``DivergedError``.
        context: around forward and backward passes.
        optimizer: of ``free``; AdamW by the schedule if left out.

    Attributes:
        last_pass: whether the backward pass that runs is the last one of its step.
    """

    def __init__(
        self,
        free: Mapping[str, Tensor],
        losses: Sequence[tuple[BatchStream, Loss]],
        score: Callable[[], Scores],
        schedule: Schedule,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
        after_step: Callable[[], None] = lambda: None,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.free = free
        self.best = {name: one.detach().clone() for name, one in free.items()}
        self.progress = Progress()
        self._losses = losses
        self._score = score
        self._schedule = schedule
        self._batch, self._device, self._dtype = batch, device, dtype
        self._penalty, self._after_step, self._context = penalty, after_step, context
        self._optimizer = optimizer or torch.optim.AdamW(
            list(free.values()), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.last_pass = False

    def run(self, state: Path, identity: str, tell: Tell = silent) -> Progress:
        """Train to the end, from a saved state if there is one; then ``free`` is as it was best.

        Raises:
            DivergedError: a loss or a step that is not finite; ``free`` is as it was best before.
            InputError, OutputError: a state that cannot be read, or is of another run.
        """
        file, schedule, progress = StateFile(state, identity), self._schedule, self.progress
        try:
            if file.exists:
                progress = self._restore(file)
            else:
                self._look(None)
            patience = math.inf if schedule.patience is None else schedule.patience
            while progress.step < schedule.steps and progress.waited < patience:
                losses = []
                for _ in range(min(schedule.evaluate_every, schedule.steps - progress.step)):
                    losses.append(self.learn())
                    tell("step", progress.step, schedule.steps, losses[-1])
                self._look(math.fsum(losses) / len(losses))
                if file.due:
                    self._save(file)
        finally:
            with torch.no_grad():
                for name, best in self.best.items():
                    self.free[name].copy_(best)
        return progress

    def learn(self) -> float:
        """One step on the next batches; returns the loss. Raises ``DivergedError``."""
        progress, schedule = self.progress, self._schedule
        place = f"at step {progress.step + 1}"
        fall = 0.5 * (1 + math.cos(math.pi * progress.step / schedule.steps)) if schedule.cosine else 1.0
        self._optimizer.param_groups[0]["lr"] = schedule.learning_rate * fall
        self._optimizer.zero_grad()
        drawn = [(loss_of, stream.next()) for stream, loss_of in self._losses]
        passes = [(loss_of, part, whole) for loss_of, whole in drawn for part in parts_of(whole, self._batch)]
        value = _descended(self._penalty())
        with self._context():
            for number, (loss_of, part, whole) in enumerate(passes, start=1):
                self.last_pass = number == len(passes)
                value += _descended(loss_of(to_device(part, self._device, self._dtype), whole))
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} {place}")
        free = list(self.free.values())
        norm = nn.utils.clip_grad_norm_(free, math.inf if schedule.clip is None else schedule.clip)
        if not bool(norm.isfinite()):
            raise DivergedError(f"the gradient is not finite {place}")
        take_step(self._optimizer, place)
        progress.step += 1
        with torch.no_grad():
            self._after_step()
        return value

    @torch.no_grad()
    def _look(self, loss: float | None) -> None:
        """Score what is free, and keep it if it is the best."""
        progress, scores = self.progress, dict(self._score())
        progress.trace.append((progress.step, loss, scores))
        progress.waited += 1
        score = next(iter(scores.values()))
        if score < progress.best_score:
            progress.best_score, progress.best_step, progress.waited = score, progress.step, 0
            for name, one in self.free.items():
                self.best[name].copy_(one)

    def _save(self, file: StateFile) -> None:
        self.progress.places = [stream.place for stream, _ in self._losses]
        tensors = {f"free.{name}": one.detach() for name, one in self.free.items()}
        tensors |= {f"best.{name}": best for name, best in self.best.items()}
        for number, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": moment for name, moment in moments.items()}
        file.save(tensors, asdict(self.progress))

    @torch.no_grad()
    def _restore(self, file: StateFile) -> Progress:
        tensors, info = file.load()
        for prefix, kept in (("free.", self.free), ("best.", self.best)):
            for name, tensor in under(tensors, prefix).items():
                kept[name].copy_(tensor)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in under(tensors, "optimizer.").items():
            number, _, name = key.partition(".")
            entries.setdefault(int(number), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        info["trace"] = [(step, loss, scores) for step, loss, scores in info["trace"]]
        self.progress = Progress(**{name: info[name] for name in asdict(self.progress)})
        for (stream, _), place in zip(self._losses, self.progress.places, strict=True):
            stream.seek((place[0], place[1]))
        self._after_step()
        return self.progress


def step_batches(data: Examples, settings: HasBatches, label: str) -> BatchStream:
    """Endless batches of steps: several that go through the model one after another."""
    return shuffled(data, settings.batch * settings.accumulate, settings.seed, label)


def parts_of(whole: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of ``size`` examples."""
    for start in range(0, len(next(iter(whole.values()))), size):
        yield {name: array[start : start + size] for name, array in whole.items()}


def label_share(part: Batch, whole: Batch) -> float:
    """The share of a part in a mean over the labels of a whole step."""
    return target_count(part) / max(target_count(whole), 1)


def _descended(loss: Tensor | float) -> float:
    """The value of a loss, whose gradient is added to that of what is free."""
    if not isinstance(loss, Tensor):
        return loss
    value = float(loss.detach())
    if loss.requires_grad and math.isfinite(value):
        loss.backward()
    return value


_OVERFLOW = "without overflow"
"""What torch says of a factor that the dtype of a parameter cannot hold; the error has no class of its own."""


def take_step(optimizer: torch.optim.Optimizer, place: str) -> None:
    """Change the parameters once.

    Args:
        place: for the error, as ``at step 3``.

    Raises:
        DivergedError: the step is larger than any number of the parameters' dtype.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if _OVERFLOW not in str(error):
            raise
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        raise DivergedError(f"a step by the learning rate {rate:g} overflows {place}") from error
