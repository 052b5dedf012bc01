"""``regmean-order``: models merged layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.learn.declare import (
    DATA_HELP,
    Input,
    LearnerSettings,
    ModelSettings,
    Note,
    OneOrSeveral,
    Option,
    Report,
    Seed,
    TextSettings,
)

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RegmeanOrderSettings(LearnerSettings, TextSettings, ModelSettings):
    """What is merged, on what, and how."""

    sources: Annotated[OneOrSeveral, Input("model"), Option(metavar="MODEL...")]
    """The models."""
    data: Annotated[OneOrSeveral, Input("data"), Option(metavar="FILE...")] = Field(
        description=f"{DATA_HELP}: those of each model, in their order, or one file for all."
    )
    weights: Annotated[tuple[Finite, ...], Option(metavar="NUMBER...", unset="equal")] = ()
    """How much each model counts."""
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.9
    """What the Gram matrices' elements off the diagonal are multiplied by."""
    ridge: Annotated[float, Field(ge=1e-12, le=1e6)] = 1e-6
    """Pull towards the average, in shares of the mean of the diagonals."""
    examples: Annotated[int | None, Field(ge=2), Option(unset="all")] = None
    """Use so many examples of each model."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples of one forward pass."""
    seed: Seed = 0
    """Draws the examples."""

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict one another."""
        count = len(self.sources)
        if count < 2:
            raise UsageError("at least two models are merged", where="--sources")
        if len(self.data) not in (1, count):
            raise UsageError(f"{len(self.data)} files for {count} models", where="--data", hint="give one for each")
        if self.weights and len(self.weights) != count:
            raise UsageError(f"{len(self.weights)} weights for {count} models", where="--weights")
        if self.weights and not sum(self.weights):
            raise UsageError("the weights add up to zero", where="--weights")


class RegmeanOrderReport(Report):
    """What was merged, in which order."""

    examples: list[int]
    """Of each model."""
    layers: list[str]
    """In the order in which they were merged."""
    matrices: list[str]
    """Those that are regression means."""
    averaged: list[str]
    """All other tensors."""

    def shown(self) -> Iterable[Note]:
        yield Note(
            f"{len(self.matrices)} matrices in {len(self.layers)} layers are regression means,"
            f" {len(self.averaged)} other tensors are averages"
        )
