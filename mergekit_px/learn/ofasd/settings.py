"""What is learned and how: every number that the result depends on, the data and models aside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mergekit_px.checkpoint.destination import Mode
from mergekit_px.errors import UsageError
from mergekit_px.learn.precision import Precision
from mergekit_px.learn.text_data import NO_TEXT, TextOptions

Objective = Literal["distill", "cross-entropy", "entropy", "negation"]
Granularity = Literal["tensor", "layer", "model", "groups", "random"]
BatchNorm = Literal["reestimate", "mean"]
Teacher = Literal["logits", "probabilities"]

_DEFAULTS: Mapping[Objective, Mapping[str, Any]] = {
    "distill": {"learning_rate": 1e-2, "weight_decay": 0.0, "steps": 300, "initial": None},
    # aTLAS takes 1e-1 and begins with 0. With some hundreds of labels that over-fits within a few steps.
    "cross-entropy": {"learning_rate": 1e-2, "weight_decay": 0.1, "steps": 300, "initial": None},
    "entropy": {"learning_rate": 1e-3, "weight_decay": 0.0, "steps": 500, "initial": 0.3, "bounds": (0.0, 1.0)},
    "negation": {"learning_rate": 5e-3, "weight_decay": 0.1, "steps": 300, "initial": 0.0},
}


@dataclass(frozen=True)
class Settings:
    """How coefficients are learned; None stands for the default of the objective.

    Attributes:
        objective: ``distill``: match the ensemble's predictions; ``cross-entropy``: fit labels; ``entropy``: make
            predictions certain; ``negation``: unfit the labels of the data, fit those of the control data.
        granularity: what shares a coefficient: a tensor, a layer, the whole model, the tensors that a pattern finds,
            or a random part of a tensor.
        groups: regular expressions for ``groups``; the first that is found in a name counts.
        random_groups: parts of each matrix for ``random``.
        temperature: T of the distillation.
        label_share: beta, the share of the cross-entropy in the loss of ``distill``.
        teacher: whether the ensemble is the mean of logits or of probabilities.
        penalty: factor of the mean |c - c_initial|^p over all coefficients.
        penalty_norm: p, 1 or 2.
        initial: what every coefficient begins with; None: the sources' shares.
        bounds: least and largest coefficient.
        clip: largest norm of the coefficients' gradient; None for no limit.
        evaluate_every: steps between two looks at the validation data.
        patience: looks without a better score after which learning stops.
        precision: of forward and backward passes; coefficients, parameters and their sums stay as they are.
        control_share: for ``negation``: share of the base's control accuracy that must be left.
    """

    objective: Objective = "distill"
    granularity: Granularity = "tensor"
    groups: tuple[str, ...] = ()
    random_groups: int = 1
    temperature: float = 1.0
    label_share: float | None = None
    teacher: Teacher = "logits"
    penalty: float = 0.0
    penalty_norm: int = 2
    initial: float | None = None
    bounds: tuple[float, float] | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = 1.0
    steps: int | None = None
    batch: int = 128
    evaluate_every: int = 20
    patience: int = 10
    batch_norm: BatchNorm = "reestimate"
    precision: Precision = "float32"
    control_share: float = 0.95
    validation: float = 0.2
    test: float = 0.2
    seed: int = 0

    def filled(self, *, labelled: bool) -> Settings:
        """With the objective's defaults, and the label share that the data allows.

        Raises:
            UsageError: settings that contradict one another or the data.
        """
        chosen = {name: value for name, value in _DEFAULTS[self.objective].items() if getattr(self, name) is None}
        share = self.label_share
        if share is None:
            share = 0.5 if labelled else 0.0
        filled = replace(self, **chosen, label_share=share)
        filled._check(labelled)
        return filled

    def _check(self, labelled: bool) -> None:
        if self.objective in ("cross-entropy", "negation") and not labelled:
            raise UsageError(f"the objective {self.objective} needs labels, the data has none")
        if self.objective == "distill" and self.label_share and not labelled:
            raise UsageError("labels are to count and the data has none", hint="set the label share to 0")
        if not 0 <= (self.label_share or 0.0) <= 1:
            raise UsageError(f"the label share lies between 0 and 1, not at {self.label_share}")
        if (self.granularity == "groups") != bool(self.groups):
            raise UsageError("granularity groups and patterns of groups go together")
        if (self.granularity == "random") != (self.random_groups > 1):
            raise UsageError("granularity random and a number of random groups above 1 go together")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise UsageError(f"the lower bound {self.bounds[0]:g} is not below the upper one {self.bounds[1]:g}")
        positive = {"temperature": self.temperature, "learning rate": self.learning_rate or 0.0}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UsageError(f"the {name} must be a finite number above 0, not {value:g}")


@dataclass(frozen=True)
class OfasdOptions:
    """What coefficients are learned for, from what, and where they go.

    Attributes:
        base: path or Hub reference.
        sources: fine-tunes of the base, or task vectors taken from it.
        data: texts, images or arrays; labels may be left out where the objective needs none.
        text: how rows of text are read.
        control: data that must stay known, for ``negation``.
        counts: examples that each source was trained on: their shares are the first coefficients and the weights of
            the ensemble; None for equal ones.
        model: ``file.py:function``; None for the class that the base's config names.
        stream: read the task vectors from their files in every step instead of keeping them in memory.
        compare: also learn one coefficient for each source, as a control.
    """

    base: str
    sources: Sequence[str]
    data: str
    output: Path = Path("coefficients")
    text: TextOptions = NO_TEXT
    control: str | None = None
    counts: Sequence[float] | None = None
    model: str | None = None
    settings: Settings = field(default_factory=Settings)
    stream: bool = False
    compare: bool = True
    device: str = "auto"
    mode: Mode = "new"
    allow_code: bool = False
    allow_pickle: bool = False
