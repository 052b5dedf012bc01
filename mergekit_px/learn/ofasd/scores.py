"""What learned coefficients are worth: scores on test data, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_px.learn.data import IGNORED, TARGETS, TEACHER, Examples
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.objective import cross_entropy, right_predictions
from mergekit_px.learn.ofasd.ensemble import Ensemble
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.ofasd.objective import best_of_teacher, counted, distillation_from

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
        """Loss and percent of right labels, percent of agreement with the teacher, and the divergence from it, as far
        as known; summed up batch by batch."""
        self.learner.settle(coefficients)
        found = self._scores_of("test", labelled=self.labelled)
        if self.has_control:
            found["control accuracy"] = self._scores_of("control_test", labelled=True)["accuracy"]
        return found

    def _scores_of(self, part: str, *, labelled: bool) -> Scores:
        sums = {"accuracy": 0.0, "loss": 0.0, "agreement": 0.0, "divergence": 0.0}
        targets, predictions, has_teacher = 0, 0, False
        for batch in self.learner.batches(part):
            logits = self.learner.predict(batch)
            if labelled:
                labels = target_count(batch)
                targets += labels
                sums["accuracy"] += 100.0 * right_predictions(logits, batch[TARGETS])
                sums["loss"] += labels * float(cross_entropy(logits, batch[TARGETS]))
            if TEACHER in batch:
                has_teacher = True
                said = counted(logits, batch)
                predictions += len(said)
                sums["agreement"] += 100.0 * int((said.argmax(dim=-1) == best_of_teacher(batch)).sum())
                sums["divergence"] += len(said) * float(
                    distillation_from(batch, said, self.learner.settings.temperature)
                )
        found = {name: sums[name] / targets for name in ("accuracy", "loss") if targets}
        return found | {name: sums[name] / predictions for name in ("agreement", "divergence") if has_teacher}


def teacher_scores(
    teacher: Ensemble, rows: Tensor, test: Examples, sources: Sequence[str], *, labelled: bool
) -> dict[str, Any]:
    """Agreement of the sources with the ensemble, its entropy, and accuracies on the test data where it has labels."""
    found: dict[str, Any] = {"agreement": teacher.agreement, "entropy": teacher.entropy, "kept": teacher.kept}
    if labelled:
        labels = test.arrays[TARGETS]

        def accuracy(best: Tensor) -> float:
            return 100.0 * float((best[rows] == labels)[labels != IGNORED].double().mean())

        found["accuracy"] = accuracy(teacher.best)
        found["sources"] = [
            {"source": name, "accuracy": accuracy(best)}
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
