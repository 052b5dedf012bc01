"""``stats``: what ``fisher``, ``regmean`` and a choice of experts need to know of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from mergekit_px.learn.declare import (
    DATA_HELP,
    Data,
    Input,
    LearnerSettings,
    ModelSettings,
    Note,
    Option,
    Report,
    Seed,
    Table,
    TextSettings,
)

Kind = Literal["fisher", "gram", "experts"]


class StatsSettings(LearnerSettings, TextSettings, ModelSettings):
    """What is measured, and how."""

    checkpoint: Annotated[str, Input("model"), Option(metavar="MODEL", by_place=True)]
    """A folder, a .safetensors file or a model of the Hub."""
    data: Data = Field(description=f"{DATA_HELP}, with labels.")
    what: Annotated[tuple[Kind, ...], Option(metavar="KIND...")] = ("fisher", "gram")
    """Of statistics: fisher, gram, experts."""
    labels: Literal["expected", "sampled", "given"] = "expected"
    """Of Fisher information: all classes, one drawn from the prediction, the data's."""
    examples: Annotated[int | None, Field(ge=2), Option(unset="all")] = None
    """Use so many examples."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples of one forward pass; Fisher information goes example by example."""
    seed: Seed = 0
    """Draws examples and labels."""


class StatsReport(Report):
    """What was measured on how much; sums that tell two measurements apart."""

    examples: int
    labels: str
    fisher_trace: float
    gram_trace: dict[str, float]
    without: list[str]
    unused_experts: dict[str, list[int]]
    """The experts of each layer that no token of the data goes to."""

    def shown(self) -> Iterable[Table | Note]:
        if self.without:
            what = f"{len(self.without)} tensors have no statistics: the model keeps them in another form"
            yield Note(what, warning=True)
        if self.unused_experts:
            count = sum(map(len, self.unused_experts.values()))
            what = f"{count} experts in {len(self.unused_experts)} layers got no token of the data, and score 0"
            yield Note(what, warning=True)
