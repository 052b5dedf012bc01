"""The training of singular values: steps that can be stopped and taken up, and the choice by validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_px.errors import DivergedError
from mergekit_px.learn.data import TARGETS, Examples, shuffled, to_device
from mergekit_px.learn.objective import loss_function, metric_function
from mergekit_px.learn.optimizer import take_step
from mergekit_px.learn.precision import Precision, passes
from mergekit_px.learn.state import load_state, save_state
from mergekit_px.learn.tune.substitution import TunedValues


@dataclass(frozen=True, slots=True)
class Schedule:
    """How values are trained; the defaults are those that AXIS takes over from aTLAS (arXiv:2407.02880).

    AdamW with a cosine from ``rate`` to 0, gradients clipped to the norm ``clip``. ``precision`` is that of forward and
    backward passes; values and weights stay in float32.
    """

    epochs: int = 10
    batch: int = 128
    rate: float = 0.1
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "float32"


@dataclass
class Progress:
    """What a training knows besides its tensors.

    Attributes:
        trace: (step, loss of the batches since the last entry, validation score) once for each epoch.
        best_step: after which the kept values were; 0 for the values as they came.
        stopped: why it ended early.
    """

    step: int = 0
    place: tuple[int, int] = (0, 0)
    trace: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    stopped: str | None = None


Tell = Callable[[int, int, float], None]


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


def is_better(score: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """By the loss, which is what is trained: accuracy is drawn from fewer numbers. What is no number never is."""
    return score["loss"] < best["loss"] or (math.isfinite(score["loss"]) and not math.isfinite(best["loss"]))


class Training:
    """Trains values on examples and keeps those that were best on validation.

    A loss that is not finite ends it; the values that were best until then are kept.

    Args:
        state: the file that keeps it, written after every epoch.
        identity: of the whole run; a state of another is refused.
        own_loss: whether the loss is the one that the model returns.
    """

    def __init__(
        self,
        values: TunedValues,
        train: Examples,
        validation: Examples,
        schedule: Schedule,
        *,
        device: torch.device,
        state: Path,
        identity: str,
        own_loss: bool = False,
    ) -> None:
        self._own_loss = own_loss
        self._values = values
        self._validation = validation
        self._schedule = schedule
        self._device = device
        self._state = state
        self._identity = identity
        self._batches = shuffled(train, schedule.batch, schedule.seed, "tune")
        self._epoch = max(1, len(train) // schedule.batch)
        self.steps = schedule.epochs * self._epoch
        self._optimizer = torch.optim.AdamW([values.values], lr=schedule.rate, weight_decay=schedule.decay)
        self._loss = loss_function("auto", allow_code=False, own_loss=own_loss)
        self._best = values.values.detach().clone()
        self.progress = Progress()

    def run(self, tell: Tell = lambda step, steps, loss: None) -> Progress:
        """Train to the end, from the saved state if there is one; then the best values are those of the model.

        Args:
            tell: gets the steps done, those to do, and the loss, after every epoch.

        Raises:
            InputError, OutputError: a state that cannot be read, or is of another run.
        """
        if self._state.exists():
            self._restore()
        else:
            self.progress.best = self._score()
            self._save()
        losses: list[float] = []
        while self.progress.step < self.steps and self.progress.stopped is None:
            try:
                losses.append(self._step())
            except DivergedError as error:
                self.progress.stopped = error.what
                break
            self.progress.step += 1
            if self.progress.step % self._epoch == 0:
                mean = math.fsum(losses) / len(losses)
                self._look(mean)
                losses = []
                self._save()
                tell(self.progress.step, self.steps, mean)
        with torch.no_grad():
            self._values.values.copy_(self._best)
        return self.progress

    def _step(self) -> float:
        """One step on the next batch; returns the loss. Raises ``DivergedError``."""
        place = f"at step {self.progress.step + 1}"
        batch = to_device(self._batches.next(), self._device, torch.float32)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate * 0.5 * (1 + math.cos(math.pi * self.progress.step / self.steps))
        self._optimizer.zero_grad()
        substituted = self._values.substituted()
        with passes(self._device, self._schedule.precision):
            loss = self._loss(substituted, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} {place}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_([self._values.values], self._schedule.clip))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient is not finite {place}")
        take_step(self._optimizer, place)
        return value

    def _look(self, loss: float) -> None:
        score = self._score()
        self.progress.trace.append((self.progress.step, loss, score))
        if is_better(score, self.progress.best):
            self.progress.best, self.progress.best_step = score, self.progress.step
            self._best = self._values.values.detach().clone()

    def _score(self) -> dict[str, float]:
        with torch.no_grad():
            module = self._values.substituted()
        schedule = self._schedule
        return evaluate(
            module, self._validation, 4 * schedule.batch, self._device, schedule.precision, own_loss=self._own_loss
        )

    def _save(self) -> None:
        self.progress.place = self._batches.place
        moments = self._optimizer.state_dict()["state"].get(0, {})
        tensors: dict[str, Tensor] = {"values": self._values.values, "best": self._best}
        tensors |= {f"optimizer.{name}": one for name, one in moments.items()}
        save_state(self._state, tensors, {"plan_hash": self._identity, "progress": asdict(self.progress)})

    @torch.no_grad()
    def _restore(self) -> None:
        tensors, info = load_state(self._state, self._identity)
        self._values.values.copy_(tensors.pop("values"))
        self._best = tensors.pop("best").to(self._device)
        moments = {name.removeprefix("optimizer."): one for name, one in tensors.items()}
        if moments:
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": {0: moments}})
        kept = dict(info["progress"])
        kept["trace"] = [(step, loss, score) for step, loss, score in kept["trace"]]
        kept["place"] = tuple(kept["place"])
        self.progress = Progress(**kept)
        self._batches.seek(self.progress.place)
