"""``search``: coefficients of a recipe by a score."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.learn.declare import (
    DATA_HELP,
    Aside,
    Code,
    Input,
    LearnerSettings,
    Note,
    Option,
    Part,
    Report,
    Seed,
    Table,
    TextSettings,
)
from mergekit_px.learn.search.space import Variable, parse_variable


class SearchSettings(LearnerSettings, TextSettings):
    """What is searched, how, and by which score."""

    recipe: Annotated[str, Input("file"), Option(metavar="RECIPE", by_place=True)]
    """A recipe, or a mergekit config."""
    over: Annotated[tuple[str, ...], Option(metavar="KEY=RANGE...")]
    """What is searched: KEY=LOW:HIGH, KEY=LOW:HIGH:STEP or KEY=A,B,C; KEY,KEY=... moves several as one."""
    how: Literal["grid", "golden", "coordinate", "cma"] = "grid"
    """All combinations, golden section on one value, on one after another, or CMA-ES on all."""
    score: Annotated[str | None, Option(metavar="COMMAND")] = None
    """A program whose last printed word scores the folder {}."""
    test_score: Annotated[str | None, Option(metavar="COMMAND")] = None
    """Scores the result and the recipe as written, nothing else."""
    data: Annotated[str | None, Input("data"), Option(metavar="FILE")] = Field(
        default=None, description=f"{DATA_HELP}: accuracy on them is the score."
    )
    test: Part = 0.5
    """With data: what is kept for the result, a share or a file; 0 for nothing."""
    minimize: bool = False
    """Less is better."""
    trials: Annotated[int, Field(ge=1), Aside()] = 100
    """Score at most so many merges, the recipe as written aside."""
    points: Annotated[int, Field(ge=2)] = 5
    """Values of a range in a grid."""
    tolerance: Annotated[float, Field(ge=1e-6, le=0.5)] = 0.02
    """Golden section ends at this share."""
    assignments: Annotated[tuple[str, ...], Option(flag="--set", metavar="KEY=VALUE...")] = ()
    """Set keys of the recipe for all trials."""
    batch: Annotated[int, Field(ge=1)] = 256
    """Examples of one forward pass."""
    seed: Seed = 0
    """Draws the test data, and CMA-ES's steps."""
    model: Code = None
    """Makes the model, if config.json names no class; needs --allow-code."""
    memory: Annotated[str | None, Aside(), Option(metavar="SIZE", panel="Run")] = None
    """Peak memory of a merge, as 4GB."""
    threads: Annotated[int | None, Field(ge=1), Aside(), Option(panel="Run")] = None
    """Number of workers of a merge."""

    @property
    def variables(self) -> tuple[Variable, ...]:
        """What is searched. Raises ``UsageError``."""
        return tuple(map(parse_variable, self.over))

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict one another."""
        if (self.score is None) == (self.data is None):
            raise UsageError("a search needs one score", hint="give --score 'COMMAND' or --data FILE")
        if self.data is not None and self.test_score is not None:
            raise UsageError("--test-score goes with --score", hint="with --data, give --test a share or a file")
        if self.data is not None and self.minimize:
            raise UsageError("accuracy is not to be minimised", hint="leave --minimize out")
        _ = self.variables


class SearchReport(Report):
    """The best values, their score, and what the test says of them and of the recipe as written."""

    variables: list[dict[str, Any]]
    score: str
    trials: int
    failed: int
    best: dict[str, Any]
    scores: dict[str, dict[str, float | None]]

    def shown(self) -> Iterable[Table | Note]:
        parts = list(self.scores["best"])
        rows = [
            (what, *(None if (score := found[part]) is None else f"{score:.6g}" for part in parts))
            for what, found in self.scores.items()
        ]
        yield Table(("recipe", *parts), rows)
        best = self.best["set"]
        what = f"--set {' '.join(best)}" if best else "the recipe as written"
        yield Note(f"best of {self.trials} trials: {what}")
