"""The training of singular values: steps that can be stopped and taken up, and the choice by validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_px.errors import DivergedError
from mergekit_px.learn.data import TARGETS, Examples, shuffled, to_device
from mergekit_px.learn.life import Tell, silent
from mergekit_px.learn.objective import loss_function, metric_function
from mergekit_px.learn.optimizer import take_step
from mergekit_px.learn.precision import Precision, passes
from mergekit_px.learn.state import load_state, save_state
from mergekit_px.learn.tune.settings import TuneSettings
from mergekit_px.learn.tune.substitution import TunedValues

_PASSES = 10
"""Over the data, where no number of steps is asked for: as many epochs as AXIS trains."""


@dataclass
class Progress:
    """What a training knows besides its tensors.

    Attributes:
        trace: (step, loss of the batches since the last entry, validation score) at each look at the validation data.
        best_step: after which the kept values were; 0 for the values as they came.
        stopped: why it ended early.
    """

    step: int = 0
    place: tuple[int, int] = (0, 0)
    trace: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    stopped: str | None = None


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

    AdamW with a cosine from the learning rate to 0, clipped gradients. A loss that is not finite ends it; the values
    that were best until then are kept.

    Args:
        state: the file that keeps it, written after every look at the validation data.
        identity: of the whole run; a state of another is refused.
        own_loss: whether the loss is the one that the model returns.
    """

    def __init__(
        self,
        values: TunedValues,
        train: Examples,
        validation: Examples,
        settings: TuneSettings,
        *,
        device: torch.device,
        state: Path,
        identity: str,
        own_loss: bool = False,
    ) -> None:
        self._own_loss = own_loss
        self._values = values
        self._validation = validation
        self._settings = settings
        self._device = device
        self._state = state
        self._identity = identity
        self._batches = shuffled(train, settings.batch, settings.seed, "tune")
        epoch = max(1, len(train) // settings.batch)
        self.steps = settings.steps or _PASSES * epoch
        self._every = settings.evaluate_every or epoch
        rate, decay = settings.learning_rate, settings.weight_decay
        self._optimizer = torch.optim.AdamW([values.values], lr=rate, weight_decay=decay)
        self._loss = loss_function("auto", allow_code=False, own_loss=own_loss)
        self._best = values.values.detach().clone()
        self.progress = Progress()

    def run(self, tell: Tell = silent) -> Progress:
        """Train to the end, from the saved state if there is one; then the best values are those of the model.

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
            tell("step", self.progress.step, self.steps, losses[-1])
            if self.progress.step % self._every == 0 or self.progress.step == self.steps:
                self._look(math.fsum(losses) / len(losses))
                losses = []
                self._save()
        with torch.no_grad():
            self._values.values.copy_(self._best)
        return self.progress

    def _step(self) -> float:
        """One step on the next batch; returns the loss. Raises ``DivergedError``."""
        place = f"at step {self.progress.step + 1}"
        batch = to_device(self._batches.next(), self._device, torch.float32)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * self.progress.step / self.steps))
        self._optimizer.zero_grad()
        substituted = self._values.substituted()
        with passes(self._device, self._settings.precision):
            loss = self._loss(substituted, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} {place}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_([self._values.values], self._settings.clip))
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
        settings = self._settings
        return evaluate(
            module, self._validation, 4 * settings.batch, self._device, settings.precision, own_loss=self._own_loss
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
