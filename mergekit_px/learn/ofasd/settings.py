"""``ofasd``: coefficients for task vectors, learned from a little data. Every number that the result depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.learn.declare import (
    DATA_HELP,
    Aside,
    Base,
    Controls,
    Data,
    Input,
    LearnerSettings,
    Note,
    Option,
    Rate,
    Report,
    Seed,
    Share,
    Sources,
    Table,
    TextSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap

Objective = Literal["distill", "cross-entropy", "entropy", "negation"]
Granularity = Literal["tensor", "layer", "model", "groups", "random"]

_DEFAULTS: Mapping[Objective, Mapping[str, Any]] = {
    "distill": {"learning_rate": 1e-2, "weight_decay": 0.0, "steps": 300, "initial": None},
    # aTLAS takes 1e-1 and begins with 0. With some hundreds of labels that over-fits within a few steps.
    "cross-entropy": {"learning_rate": 1e-2, "weight_decay": 0.1, "steps": 300, "initial": None},
    "entropy": {"learning_rate": 1e-3, "weight_decay": 0.0, "steps": 500, "initial": 0.3, "bounds": (0.0, 1.0)},
    "negation": {"learning_rate": 5e-3, "weight_decay": 0.1, "steps": 300, "initial": 0.0},
}


class CoefficientSettings(TrainingSettings):
    """How coefficients are learned; None stands for the default of the objective."""

    objective: Objective = "distill"
    """What is learned by: the sources' ensemble, labels, certainty, unfitting labels."""
    granularity: Granularity = "tensor"
    """What has a coefficient of its own for each source."""
    groups: Annotated[tuple[str, ...], Option(metavar="REGEX...")] = ()
    """With granularity groups: patterns of tensor names; the first that is found in a name counts."""
    random_groups: Annotated[int, Field(ge=1)] = 1
    """With granularity random: parts of each matrix."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of the distillation."""
    label_share: Annotated[Share | None, Option(unset="0.5 with labels")] = None
    """Share of the labels in the loss of the distillation."""
    teacher: Literal["logits", "probabilities"] = "logits"
    """What of the sources is averaged."""
    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the distance from the first coefficients."""
    penalty_norm: Annotated[int, Field(ge=1, le=2)] = 2
    """Of that distance."""
    initial: Annotated[float | None, Option(unset="by the objective")] = None
    """First value of all coefficients."""
    bounds: Annotated[tuple[float, float] | None, Option(metavar="LOW HIGH", unset="none; entropy: 0 1")] = None
    """Least and largest coefficient."""
    learning_rate: Annotated[Rate | None, Option(unset="by the objective")] = None
    """Of AdamW."""
    weight_decay: Annotated[float | None, Field(ge=0), Option(unset="by the objective")] = None
    """Of AdamW."""
    clip: Annotated[float | None, Field(ge=0)] = 1.0
    """Largest norm of the gradient of the coefficients."""
    steps: Annotated[int | None, Field(ge=0), Option(unset="300; entropy: 500")] = None
    """Most steps."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Examples in a step."""
    evaluate_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two validations."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Validations without gain until the end."""
    batch_norm: Literal["reestimate", "mean"] = "reestimate"
    """Running statistics: estimated anew on the data, or the sources' mean."""
    control_share: Share = 0.95
    """For negation: share of the base's accuracy on the control data that must be left."""
    validation: Share = 0.2
    """Share of the data that selects."""
    test: Share = 0.2
    """Share of the data that the report is about."""
    seed: Seed = 0
    """Of the split, the order and random groups."""

    def filled(self, *, labelled: bool) -> Self:
        """With the objective's defaults, and the label share that the data allows.

        Raises:
            UsageError: settings that contradict one another or the data.
        """
        chosen = {name: value for name, value in _DEFAULTS[self.objective].items() if getattr(self, name) is None}
        share = self.label_share
        if share is None:
            share = 0.5 if labelled else 0.0
        filled = self.model_copy(update={**chosen, "label_share": share})
        filled._check(labelled)
        return filled

    def _check(self, labelled: bool) -> None:
        if self.objective in ("cross-entropy", "negation") and not labelled:
            raise UsageError(f"the objective {self.objective} needs labels, the data has none")
        if self.objective == "distill" and self.label_share and not labelled:
            raise UsageError("labels are to count and the data has none", hint="set the label share to 0")
        if (self.granularity == "groups") != bool(self.groups):
            raise UsageError("granularity groups and patterns of groups go together")
        if (self.granularity == "random") != (self.random_groups > 1):
            raise UsageError("granularity random and a number of random groups above 1 go together")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise UsageError(f"the lower bound {self.bounds[0]:g} is not below the upper one {self.bounds[1]:g}")


class OfasdSettings(LearnerSettings, TextSettings, CoefficientSettings):
    """What coefficients are learned for, and from what."""

    base: Base
    """The model that all sources began with."""
    sources: Sources
    """Fine-tunes of the base, task vectors taken from it, or adapters of it."""
    data: Data = Field(description=f"{DATA_HELP}; labels may be left out where the objective needs none.")
    control_data: Annotated[str | None, Input("data"), Option(metavar="FILE")] = None
    """Labelled examples that must stay known (negation)."""
    counts: Annotated[tuple[float, ...], Option(metavar="N...", unset="equal shares")] = ()
    """Examples that each source learned from: its share at first, and in the ensemble."""
    controls: Controls = "all"
    """What the result is compared with: nothing, base and averages, or one coefficient for each source too."""
    stream: Annotated[bool, Aside()] = False
    """Read task vectors from their files in every step; memory for one at a time."""


class OfasdReport(Report):
    """What was learned, and what it is worth beside its controls."""

    sources: list[str]
    shares: list[float]
    labels: str | None
    examples: dict[str, int]
    steps: int
    best_step: int
    best_validation_score: float
    trace: list[tuple[int, float | None, float]]
    test: dict[str, dict[str, float]]
    teacher: dict[str, Any] | None
    warnings: list[str]
    coefficients: dict[str, list[float]]
    recipe: str

    def shown(self) -> Iterable[Table | Note]:
        rows: dict[str, Mapping[str, Any]] = dict(self.test)
        if self.teacher is not None:
            rows["teacher"] = self.teacher
            rows |= {one["source"]: one for one in self.teacher.get("sources", ())}
        titles = list(dict.fromkeys(key for scores in self.test.values() for key in scores))
        cells = [(f"{scores[title]:.4g}" if title in scores else None for title in titles) for scores in rows.values()]
        yield Table(("on test data", *titles), [(name, *row) for name, row in zip(rows, cells, strict=True)])
        yield from (Note(text, warning=True) for text in self.warnings)
        best = f"best after {self.best_step} of {self.steps} steps"
        yield Note(f"{best}; {self.examples['test']} test examples")
        yield Note(f"to apply them: pxmerge run {self.recipe}")

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        from mergekit_px.learn.pictures import by_layer, traces

        yield from by_layer("coefficient", self.coefficients, self.sources)
        yield from traces(self.trace, self.best_step)
