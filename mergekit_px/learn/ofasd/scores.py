"""What learned coefficients are worth: scores on test data, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_px.learn.data import IGNORED, LABELS, Examples
from mergekit_px.learn.ofasd.ensemble import Ensemble, accuracy
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.ofasd.objective import TEACHER, agreement, distillation

Scores = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """Scores coefficients on the test data of a learner."""

    learner: Learner
    labelled: bool
    has_control: bool

    def of(self, learner: Learner) -> Bench:
        """The same for coefficients of other blocks."""
        return replace(self, learner=learner)

    @torch.no_grad()
    def score(self, coefficients: Tensor) -> Scores:
        """Percent of right labels, of agreement with the teacher, and the divergence from it, as far as known."""
        self.learner.settle(coefficients)
        logits, columns = self._predictions("test")
        found: Scores = {}
        if self.labelled:
            found["accuracy"] = accuracy(logits, columns[LABELS], IGNORED)
        if TEACHER in columns:
            temperature = self.learner.settings.temperature
            found["agreement"] = agreement(logits, columns[TEACHER])
            found["divergence"] = float(distillation(logits, columns[TEACHER], temperature))
        if self.has_control:
            kept, control = self._predictions("control_test")
            found["control accuracy"] = accuracy(kept, control[LABELS], IGNORED)
        return found

    def _predictions(self, part: str) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, columns = [], []
        for batch in self.learner.batches(part):
            logits.append(self.learner.predict(batch).float().cpu())
            columns.append({name: batch[name].cpu() for name in (LABELS, TEACHER) if name in batch})
        return torch.cat(logits), {name: torch.cat([one[name] for one in columns]) for name in columns[0]}


def teacher_scores(
    teacher: Ensemble, rows: Tensor, test: Examples, sources: Sequence[str], *, labelled: bool
) -> dict[str, Any]:
    """Agreement of the sources with the ensemble, its entropy, and accuracies on the test data where it has labels."""
    found: dict[str, Any] = {"agreement": teacher.agreement, "entropy": teacher.entropy}
    if labelled:
        labels = test.arrays[LABELS]
        counted = labels != IGNORED
        found["accuracy"] = accuracy(test.arrays[TEACHER], labels, IGNORED)
        found["sources"] = [
            {"source": name, "accuracy": 100.0 * float((best[rows] == labels)[counted].double().mean())}
            for name, best in zip(sources, teacher.predictions, strict=True)
        ]
    return found


def warnings_about(scores: Mapping[str, Scores], teacher: Mapping[str, Any] | None) -> list[str]:
    """What a reader of the scores must not miss."""
    found = []
    averages = [
        scores[name]["accuracy"] for name in ("average", "weighted average") if "accuracy" in scores.get(name, {})
    ]
    if teacher is not None and averages and teacher["accuracy"] <= max(averages):
        found.append(
            f"the teacher ({teacher['accuracy']:.1f}%) is no better than the plain average ({max(averages):.1f}%):"
            " distillation cannot gain here; labels can"
        )
    if teacher is not None and "accuracy" not in teacher:
        found.append(
            f"without labels nothing tells whether the teacher is right; its sources agree with it in"
            f" {teacher['agreement']:.0f}% of the examples"
        )
    if averages and scores["learned"]["accuracy"] < max(averages) and "control accuracy" not in scores["learned"]:
        found.append("on the test data the learned coefficients are worse than the plain average")
    return found
