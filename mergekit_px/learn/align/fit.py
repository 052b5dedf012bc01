"""Few-shot training of whatever changes a model: rotations, or its parameters themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.errors import DivergedError
from mergekit_px.learn.align.settings import AlignSettings
from mergekit_px.learn.data import Batch, Examples, shuffled, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.life import Tell
from mergekit_px.learn.optimizer import take_step
from mergekit_px.learn.state import load_state, save_state, under

Trace = list[tuple[int, float | None, float]]


class Fit:
    """AdamW on a cosine schedule; what did best on the validation data is kept.

    Args:
        free: what learns, changed in place.
        loss: of a batch, with all penalties.
        score: of a batch of the validation data; lower is better.
        after_step: what is done to ``free`` after each step.
    """

    def __init__(
        self,
        free: Mapping[str, Tensor],
        loss: Callable[[Batch], Tensor],
        score: Callable[[Batch], Tensor],
        settings: AlignSettings,
        *,
        rate: float,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._free = free
        self._loss, self._score = loss, score
        self._settings = settings
        self._rate = rate
        self._after_step = after_step
        self._optimizer = torch.optim.AdamW(list(free.values()), lr=rate, weight_decay=settings.weight_decay)
        self.step = 0
        self.best_step = 0
        self.best_score = math.inf
        self.trace: Trace = []
        self._best: dict[str, Tensor] = {}

    def run(
        self,
        parts: Mapping[str, Examples],
        device: torch.device,
        state: Path,
        plan_hash: str,
        tell: Tell,
    ) -> None:
        """Train on ``train`` and leave ``free`` as it was best on ``validation``; goes on from a saved state.

        Raises:
            DivergedError: a loss or a step that is not finite; ``free`` is as it was best before.
        """
        settings = self._settings
        dtype = next((one.dtype for one in self._free.values()), torch.float32)
        stream = shuffled(parts["train"], settings.batch, settings.seed, "train")
        if state.exists():
            stream.seek(self._restore(state, plan_hash))
        else:
            self._look(None, parts, device, dtype)
        while self.step < settings.steps:
            losses = []
            for _ in range(min(settings.evaluate_every, settings.steps - self.step)):
                try:
                    losses.append(self._learn(to_device(stream.next(), device, dtype)))
                except DivergedError:
                    self._take_best()
                    raise
                tell("step", self.step, settings.steps, losses[-1])
            self._look(math.fsum(losses) / len(losses), parts, device, dtype)
            self._save(state, plan_hash, stream.place)
        self._take_best()

    def _learn(self, batch: Batch) -> float:
        loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} at step {self.step}")
        gradients = torch.autograd.grad(loss, list(self._free.values()), allow_unused=True)
        for free, gradient in zip(self._free.values(), gradients, strict=True):
            free.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(list(self._free.values()), 1.0)
        if not bool(norm.isfinite()):
            raise DivergedError(f"the gradient is not finite at step {self.step}")
        fall = 0.5 * (1 + math.cos(math.pi * self.step / self._settings.steps))
        self._optimizer.param_groups[0]["lr"] = self._rate * fall
        take_step(self._optimizer, f"at step {self.step}")
        self._after_step()
        self.step += 1
        return value

    @torch.no_grad()
    def _look(
        self, loss: float | None, parts: Mapping[str, Examples], device: torch.device, dtype: torch.dtype
    ) -> None:
        total, count = 0.0, 0
        for batch in parts["validation"].batches(self._settings.batch):
            targets = target_count(batch)
            total += float(self._score(to_device(batch, device, dtype))) * targets
            count += targets
        score = total / count if count else math.nan
        self.trace.append((self.step, loss, score))
        if score < self.best_score:
            self.best_score, self.best_step = score, self.step
            self._best = {name: free.detach().clone() for name, free in self._free.items()}

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, best in self._best.items():
            self._free[name].copy_(best)

    def _save(self, path: Path, plan_hash: str, place: tuple[int, int]) -> None:
        tensors = {f"free.{name}": free.detach() for name, free in self._free.items()}
        tensors.update({f"best.{name}": best for name, best in self._best.items()})
        for number, moments in self._optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{number}.{name}": moment for name, moment in moments.items()})
        info: dict[str, Any] = {
            "plan_hash": plan_hash,
            "step": self.step,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "trace": self.trace,
            "place": place,
        }
        save_state(path, tensors, info)

    def _restore(self, path: Path, plan_hash: str) -> tuple[int, int]:
        tensors, info = load_state(path, plan_hash)
        with torch.no_grad():
            for name, tensor in under(tensors, "free.").items():
                self._free[name].copy_(tensor)
        self._best = {name: best.to(self._free[name].device) for name, best in under(tensors, "best.").items()}
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in under(tensors, "optimizer.").items():
            number, _, name = key.partition(".")
            entries.setdefault(int(number), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        self.step, self.best_step, self.best_score = info["step"], info["best_step"], info["best_score"]
        self.trace = [(step, loss, score) for step, loss, score in info["trace"]]
        first, second = info["place"]
        return first, second
