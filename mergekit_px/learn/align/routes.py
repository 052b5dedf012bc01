"""A route with its controls: the same with a random task vector, none at all, and few-shot fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_px.errors import DivergedError
from mergekit_px.learn.align.fixed import Artefact, FixedMap, Transport
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.pieces import Piece
from mergekit_px.learn.align.rotations import ROTATIONS_FILE, Rotations
from mergekit_px.learn.align.settings import AlignSettings, AlignTask
from mergekit_px.learn.data import Batch, Examples, derived_seed, to_device
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.life import Run
from mergekit_px.learn.training import Progress, Schedule, Training, label_share, step_batches

Deltas = Mapping[str, Tensor]
Keep = Callable[[Deltas, Artefact | None], None]

CONTROLS = ("zero-shot", "naive", "aligned", "sham", "few-shot fine-tune", "fine-tune from naive")
"""What a report scores, with all controls."""


@dataclass
class Trial:
    """One alignment: all that it and its controls share."""

    life: Run[AlignTask]
    model: ChangedModel
    parts: Mapping[str, Sequence[Examples]]
    """The data of each task with a head of its own, or all in one."""
    pieces: Sequence[Piece]
    fixed: FixedMap | None
    metadata: Mapping[str, str]

    @property
    def settings(self) -> AlignTask:
        return self.life.settings

    def run(self, deltas: Deltas, fitting: Deltas, keep: Keep) -> dict[str, Any]:
        """Transport, keep the result, and score it beside its controls.

        Args:
            deltas: the whole task vector.
            fitting: the part of it that has the shapes of the target: what the naive transfer adds.
            keep: writes a transported task vector, and what it was transported with if that can be used again.
        """
        moved, rotations, progress = self._transported("aligned", deltas, fitting, keep)
        keep(moved, self._artefact(rotations))
        found: dict[str, Any] = {
            "transported": moved,
            "steps": progress.step,
            "best_step": progress.best_step,
            "trace": progress.ranks,
            "norm": {"before": norm(deltas), "after": norm(moved)},
            **(self.fixed.report if self.fixed is not None else {}),
        }
        if rotations is not None:
            distances = rotations.distances()
            found["rotations"] = {
                "matrices": len(rotations.free),
                "stay": self._staying(fitting),
                "orthogonality_error": rotations.orthogonality_error(),
                "mean_distance_from_identity": sum(distances.values()) / max(1, len(distances)),
                "distances_from_identity": distances,
                "spectrum_distance": self._spectrum_distance(fitting, moved),
            }
        found["test"] = self._scores(deltas, fitting, moved)
        return found

    def _scores(self, deltas: Deltas, fitting: Deltas, moved: Deltas) -> dict[str, float]:
        """Of the result and of the controls that were asked for."""
        scale, wanted = self.settings.scale, self.settings.controls
        found = {"aligned": self.score(moved)}
        if wanted != "none":
            found = {"zero-shot": self.score({}), "naive": self.score(fitting), **found}
        if wanted == "all":
            sham = {name: sham_of(name, delta, self.settings) for name, delta in deltas.items()}
            fitting_sham = {name: sham[name] for name in fitting}
            found["sham"] = self.score(self._transported("sham", sham, fitting_sham, None)[0])
            del sham, fitting_sham
            found["few-shot fine-tune"] = self.score(self._tuned("tuned", {}), 1.0)
            begun = {name: scale * delta for name, delta in fitting.items()}
            found["fine-tune from naive"] = self.score(self._tuned("tuned-naive", begun), 1.0)
            found |= {name: self.score(transport(fitting)) for name, transport in self._controls()}
        return found

    def score(self, changes: Deltas, scale: float | None = None) -> float:
        """Percent of right labels on the test data."""
        return self.model.accuracy(changes, self.batches("test"), self.settings.scale if scale is None else scale)

    def batches(self, part: str, task: int | None = None) -> Iterator[Batch]:
        """The batches of a part, or of one of its tasks, in order, on the device."""
        return (
            to_device(batch, self.life.device, self.model.dtype)
            for number, examples in enumerate(self.parts[part])
            if task in (None, number)
            for batch in examples.batches(self.settings.batch)
        )

    def _transported(
        self, name: str, deltas: Deltas, fitting: Deltas, keep: Keep | None
    ) -> tuple[Deltas, Rotations | None, Progress]:
        if self.fixed is not None:
            shapes = {site: tuple(one.target.shape) for site, one in self.model.sites.items()}
            return self.fixed.moved(deltas, fitting, shapes), None, Progress()
        return self._rotated(name, fitting, keep)

    def _controls(self) -> list[tuple[str, Transport]]:
        return list(self.fixed.controls.items()) if self.fixed is not None else []

    def _artefact(self, rotations: Rotations | None) -> Artefact | None:
        if rotations is not None:
            return Artefact(ROTATIONS_FILE, rotations.matrices(), self.metadata)
        return self.fixed.artefact if self.fixed is not None else None

    def _rotated(self, name: str, deltas: Deltas, keep: Keep | None) -> tuple[Deltas, Rotations, Progress]:
        settings, model = self.settings, self.model
        pieces = [piece for piece in self.pieces if piece.tensor in deltas]
        rotations = Rotations(pieces, settings, self.life.device, model.dtype)

        def fidelity(batch: Batch) -> Tensor:
            return model.loss(rotations.transport(deltas), batch, settings.scale)

        training = self._training(
            rotations.free,
            fidelity,
            settings.learning_rate,
            penalty=rotations.penalty,
            after_step=rotations.retract if settings.parametrisation == "polar" else lambda: None,
        )
        self.life.note(f"learning {len(rotations.free)} matrices ({name})")
        try:
            self._run(training, name)
        except DivergedError as error:
            if keep is None:
                raise self._stopped(error, f"the control '{name}'", "learning rate") from error
            keep(rotations.transport(deltas), self._artefact(rotations))
            raise DivergedError(
                f"{error.what}; the result of step {training.progress.best_step}, the best before, is kept",
                where=str(self.life.output),
                hint="lower the learning rate and start over with --overwrite",
            ) from error
        if settings.project:
            rotations.retract()
        return rotations.transport(deltas), rotations, training.progress

    def _tuned(self, name: str, start: Deltas) -> Deltas:
        """The changes of a few-shot fine-tune that begins with some changes of the target base."""
        free = {
            site.name: start.get(site.name, torch.zeros_like(site.value)).clone().requires_grad_()
            for site in self.model.sites.values()
            if site.is_parameter and not self.model.in_head(site)
        }
        fixed = {other: delta for other, delta in start.items() if other not in free}

        def loss(batch: Batch) -> Tensor:
            return self.model.loss({**fixed, **free}, batch)

        self.life.note(f"few-shot fine-tune ({name})")
        try:
            self._run(self._training(free, loss, self.settings.tune_rate), name)
        except DivergedError as error:
            raise self._stopped(error, "a few-shot fine-tune", "rate of the fine-tunes") from error
        return {**fixed, **{other: one.detach() for other, one in free.items()}}

    def _training(
        self, free: dict[str, Tensor], loss: Callable[[Batch], Tensor], rate: float, **options: Any
    ) -> Training:
        settings = self.settings

        def score() -> dict[str, float]:
            scores = [(float(loss(batch)), target_count(batch)) for batch in self.batches("validation")]
            count = sum(targets for _, targets in scores)
            return {"loss": sum(one * targets for one, targets in scores) / count if count else math.nan}

        return Training(
            free,
            [
                (
                    step_batches(examples, settings, f"train {number}" if number else "train"),
                    lambda part, whole: loss(part) * label_share(part, whole) / len(self.parts["train"]),
                )
                for number, examples in enumerate(self.parts["train"])
            ],
            score,
            Schedule(settings.steps, settings.evaluate_every, rate, settings.weight_decay),
            batch=settings.batch,
            device=self.life.device,
            dtype=self.model.dtype,
            **options,
        )

    def _run(self, training: Training, name: str) -> None:
        life = self.life
        training.run(life.work / f"{name}.safetensors", life.identity, life.tell)

    def _stopped(self, error: DivergedError, control: str, rate: str) -> DivergedError:
        """The error for a control that diverged when the result itself was written."""
        return DivergedError(
            f"{error.what} of {control}; the transported task vector is kept, without scores",
            where=str(self.life.output),
            hint=f"lower the {rate} and start over with --overwrite",
        )

    def _staying(self, deltas: Deltas) -> list[str]:
        """The matrices of the task vector that are added as they are."""
        turned = {piece.tensor for piece in self.pieces}
        return [name for name in deltas if self.model.sites[name].target.ndim == 2 and name not in turned]

    @torch.no_grad()
    def _spectrum_distance(self, before: Deltas, after: Deltas) -> float:
        """The largest relative change of the singular values of a piece."""
        worst = 0.0
        for piece in self.pieces:
            if piece.tensor in before:
                rows = slice(piece.start, piece.stop)
                values = [torch.linalg.svdvals(one[piece.tensor][rows].double()) for one in (before, after)]
                size = float(values[0].norm())
                worst = max(worst, float((values[0] - values[1]).norm()) / size if size else 0.0)
        return worst


@torch.no_grad()
def norm(deltas: Deltas) -> float:
    """Of all tensors together."""
    return float(torch.stack([delta.double().square().sum() for delta in deltas.values()]).sum().sqrt())


def sham_of(name: str, delta: Tensor, settings: AlignSettings) -> Tensor:
    """A random tensor like one of a task vector: normal noise of its norm (``gauss``), or a matrix between two random
    orthogonal ones, which keeps its singular values too (``rotated``; tensors that are no matrices become noise)."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "sham", name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if settings.sham == "rotated" and delta.ndim == 2 and min(delta.shape) > 1:
        left, right = (torch.linalg.qr(draw(size, size)).Q.to(delta) for size in delta.shape)
        rotated: Tensor = left @ delta @ right
        return rotated
    noise = draw(*delta.shape).to(delta)
    size = noise.norm()
    return noise * (delta.norm() / size) if float(size) > 0 else noise
