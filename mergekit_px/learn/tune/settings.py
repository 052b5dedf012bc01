"""``tune``: singular values of a merged update, trained on labelled data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mergekit_px.learn.declare import (
    Aside,
    Base,
    Input,
    LabelledSettings,
    LearnerSettings,
    Note,
    Option,
    Report,
    Table,
    TrainingSettings,
)

if TYPE_CHECKING:
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TuneSettings(LearnerSettings, LabelledSettings, TrainingSettings):
    """The defaults are those that AXIS takes over from aTLAS (arXiv:2407.02880)."""

    components: Annotated[str, Input("file"), Option(metavar="COMPONENTS", by_place=True)]
    """A .safetensors file of components."""
    base: Base
    """The model that the update was taken from."""
    top: Annotated[int | None, Field(ge=1), Option(unset="all")] = None
    """Train the N largest values of each matrix."""
    core: bool = False
    """Train a full N x N matrix between the vectors, not its diagonal."""
    match: Annotated[tuple[str, ...], Option(metavar="GLOB...")] = ("*",)
    """The matrices to train, by name."""
    steps: Annotated[int | None, Field(ge=1), Option(unset="ten passes over the data")] = None
    """Of training."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Examples in a step."""
    evaluate_every: Annotated[int | None, Field(ge=1), Option(unset="a pass over the data")] = None
    """Steps between two validations."""
    learning_rate: Finite = 0.1
    """At the start of the cosine, in units of the root mean square of each matrix's values."""
    weight_decay: Finite = 0.1
    """Of AdamW, towards the base."""
    clip: Finite = 1.0
    """Largest norm of a gradient."""
    allow_base_mismatch: Annotated[bool, Aside(), Option(panel="Run")] = False
    """Use a base that the update was not taken from."""


class TuneReport(Report):
    """Scores of the base, of the components as they came and of the tuned ones, on validation and test."""

    labels: str
    trained_values: int
    examples: dict[str, int]
    steps: int
    selected_step: int
    stopped: str | None
    trace: list[dict[str, Any]]
    scores: dict[str, dict[str, dict[str, float]]]
    changes: dict[str, float]
    """Of the trained values of each matrix, as a share of their norm."""

    def shown(self) -> Iterable[Table | Note]:
        rows = [
            (what, part, *(f"{score[name]:.4g}" if name in score else None for name in ("accuracy", "loss")))
            for what, parts in self.scores.items()
            for part, score in parts.items()
        ]
        yield Table(("model", "data", "accuracy, %", "loss"), rows, texts=2)
        if self.selected_step == 0:
            yield Note("no step made the validation score better: the components are kept as they came")
        yield Note(f"{self.trained_values} values trained, chosen after step {self.selected_step}")

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        from mergekit_px.learn.pictures import by_layer, traces
        from mergekit_px.pictures.curves import curves

        measure = "change of the singular values, as a share of their norm"
        yield from by_layer(measure, {name: (change,) for name, change in self.changes.items()})
        trace = [(entry["step"], entry["loss"], entry["validation"]) for entry in self.trace]
        loss, _ = traces([(step, loss, 0.0) for step, loss, _ in trace], self.selected_step)
        yield loss
        for name in trace[0][2] if trace else ():
            line = {name: [(step, scores[name]) for step, _, scores in trace]}
            yield curves(f"{name} on the validation data", "step", line, marked=(self.selected_step, "chosen"))
