"""How a task vector is aligned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_px.errors import UsageError

Route = Literal["orthogonal", "theseus", "gradfix"]
Parametrisation = Literal["soft", "cayley", "polar"]


@dataclass(frozen=True)
class AlignSettings:
    """Every number that the result depends on, the data and models aside.

    Attributes:
        route: ``orthogonal``: rotations learned from labels; ``theseus``: Procrustes maps between activations;
            ``gradfix``: only elements whose sign lowers the loss.
        parametrisation: ``soft``: free matrices and a penalty; ``cayley``: exactly orthogonal; ``polar``: free steps,
            each followed by the nearest orthogonal matrix.
        sided: ``one`` matrix on both sides of a change, or ``two``, one on each.
        sites: ``attention``: the square projections of attention; ``all``: every linear layer.
        scale: factor of the transported task vector (lambda).
        orthogonality: factor of the penalty (beta), for ``soft``.
        project: replace soft matrices by the nearest orthogonal ones when they are learned.
        majority: for ``gradfix``: signs by a vote of the examples instead of the mean gradient.
        learning_rate: of the rotations.
        tune_rate: of the few-shot fine-tunes that the result is compared with.
    """

    route: Route = "orthogonal"
    parametrisation: Parametrisation = "soft"
    sided: Literal["one", "two"] = "one"
    sites: Literal["attention", "all"] = "attention"
    scale: float = 1.0
    orthogonality: float = 1.0
    project: bool = False
    majority: bool = True
    learning_rate: float = 3e-3
    tune_rate: float = 5e-4
    weight_decay: float = 0.0
    steps: int = 150
    batch: int = 64
    evaluate_every: int = 10
    validation: float = 0.2
    test: float = 0.3
    seed: int = 0

    def check(self) -> None:
        """Raise ``UsageError`` for numbers that cannot be meant."""
        for name, value in (("learning rate", self.learning_rate), ("rate of the fine-tunes", self.tune_rate)):
            if not value > 0:
                raise UsageError(f"the {name} must be above 0, not {value:g}")
        if self.project and self.parametrisation != "soft":
            raise UsageError(f"{self.parametrisation} matrices are orthogonal already", hint="project goes with soft")
