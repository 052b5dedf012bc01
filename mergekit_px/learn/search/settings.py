"""``search``: coefficients of a recipe by a score."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from mergekit_px.learn.search.objectives import BALANCED, Objective, parse_objectives
from mergekit_px.learn.search.space import Variable, parse_variable

if TYPE_CHECKING:
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap

HARNESS = "lm_eval"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class SearchSettings(LearnerSettings, TextSettings):
    """What is searched, how, and by which score."""

    recipe: Annotated[str, Input("file"), Option(metavar="RECIPE", by_place=True)]
    """A recipe, or a mergekit config."""
    over: Annotated[tuple[str, ...], Option(metavar="KEY=RANGE...")]
    """What is searched: KEY=LOW:HIGH, KEY=LOW:HIGH:STEP or KEY=A,B,C; KEY,KEY=... moves several as one."""
    how: Literal["grid", "golden", "coordinate", "cma", "nsga2"] = "grid"
    """All combinations, golden section on one value, on one after another, CMA-ES on all, or NSGA-II."""
    start_from: Annotated[str | None, Input("file"), Option(metavar="FILE")] = None
    """Tried first: trials.jsonl of an earlier search, of which its best, or a JSON line for each point."""
    score: Annotated[str | None, Option(metavar="COMMAND")] = None
    """A program that scores the folder {}: its last word, or a JSON object of numbers as its last line."""
    test_score: Annotated[str | None, Option(metavar="COMMAND")] = None
    """Scores the result and the recipe as written, nothing else."""
    data: Annotated[str | None, Input("data"), Option(metavar="FILE")] = Field(
        default=None, description=f"{DATA_HELP}: accuracy on them is the score."
    )
    test: Part = 0.5
    """With data: what is kept for the result, a share or a file; 0 for nothing."""
    evaluate: Annotated[str | None, Option(metavar="lm_eval:TASK,TASK")] = None
    """Tasks of lm-eval whose metrics are the score."""
    test_evaluate: Annotated[str | None, Option(metavar="lm_eval:TASK,TASK")] = None
    """Tasks for the result and the recipe as written, nothing else."""
    tasks_folder: Annotated[str | None, Input("tasks"), Option(metavar="DIR")] = None
    """Where lm-eval finds YAML files of other tasks."""
    examples: Annotated[int | None, Field(ge=1), Option(unset="all")] = None
    """Examples of each task of lm-eval."""
    objective: Annotated[tuple[str, ...], Option(metavar="NAME...")] = ()
    """Numbers of the score that count: NAME, NAME:min or NAME:max."""
    pick: Annotated[str | None, Aside(), Option(metavar="NAME|balanced", unset="the first objective")] = None
    """Which of the best trials is the result: by one objective, or by all."""
    minimize: bool = False
    """Less is better, of a score that is one number."""
    trials: Annotated[int, Field(ge=1), Aside()] = 100
    """Score at most so many merges, the recipe as written aside."""
    time: Annotated[str | None, Aside(), Option(metavar="30m", unset="no limit")] = None
    """Begin no trial after so long."""
    jobs: Annotated[int | None, Field(ge=1), Aside(), Option(unset="1; on a cluster, as many as have room")] = None
    """Score so many models at once."""
    cluster: Annotated[str | None, Aside(), Option(metavar="CLUSTER", panel="Run")] = None
    """Hand trials out to Ray: ray begins it here, ray:HOST:PORT joins one."""
    scratch: Annotated[str | None, Aside(), Option(metavar="DIR", unset="memory if it has room")] = None
    """Where the models of trials are."""
    points: Annotated[int, Field(ge=2)] = 5
    """Values of a range in a grid."""
    tolerance: Annotated[float, Field(ge=1e-6, le=0.5)] = 0.02
    """Golden section ends at this share."""
    assignments: Annotated[tuple[str, ...], Option(flag="--set", metavar="KEY=VALUE...")] = ()
    """Set keys of the recipe for all trials."""
    batch: Annotated[int, Field(ge=1)] = 256
    """Examples of one forward pass."""
    seed: Seed = 0
    """Draws the test data, and the steps of CMA-ES and NSGA-II."""
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

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What counts. Raises ``UsageError``."""
        return parse_objectives(self.objective, minimize=self.minimize)

    @property
    def picked(self) -> str:
        """What the result is chosen by: the name of an objective, or ``balanced``."""
        return self.pick or self.objectives[0].name

    @property
    def tested(self) -> bool:
        """Whether there is a test of the result."""
        return self.test != 0 if self.data is not None else (self.test_score or self.test_evaluate) is not None

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict one another."""
        if self.cluster is not None:
            from mergekit_px.execute.ray_tasks import parse_cluster

            parse_cluster(self.cluster)
        given = [flag for flag, value in zip(_SCORES, (self.score, self.data, self.evaluate), strict=True) if value]
        if len(given) != 1:
            what = "a search needs one score"
            raise UsageError(what, hint="give --score 'COMMAND', --data FILE or --evaluate lm_eval:TASK")
        if self.test_score is not None and self.score is None:
            raise UsageError("--test-score goes with --score", hint=_TESTS)
        if self.test_evaluate is not None and self.evaluate is None:
            raise UsageError("--test-evaluate goes with --evaluate", hint=_TESTS)
        if self.data is not None and self.minimize:
            raise UsageError("accuracy is not to be minimised", hint="leave --minimize out")
        for flag, asked in (("--evaluate", self.evaluate), ("--test-evaluate", self.test_evaluate)):
            harness, _, tasks = (asked or f"{HARNESS}:task").partition(":")
            if harness != HARNESS or not all(tasks.split(",")):
                raise UsageError(f"it is {HARNESS}:TASK, or {HARNESS}:TASK,TASK", where=f"{flag} {asked}")
        if self.time is not None:
            parse_time(self.time)
        _ = self.variables
        names = [one.name for one in self.objectives]
        if self.pick is not None and self.pick not in (*names, BALANCED):
            raise UsageError(
                f"there is no objective '{self.pick}'", where="--pick", hint=f"known are {', '.join(names)}"
            )


_SCORES = ("--score", "--data", "--evaluate")
_TESTS = "with --data, give --test a share or a file"


def parse_time(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``1h30m`` or ``2d``. Raises ``UsageError``."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise UsageError("it is no time", where=f"--time {text}", hint="write 90s, 30m, 1h30m or 2d")
    return math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)


class SearchReport(Report):
    """The best values, their scores, the trials that no other beats, and what the test says of the best and of the
    recipe as written."""

    variables: list[dict[str, Any]]
    score: str
    objectives: list[str]
    trials: int
    failed: int
    stopped: str
    """Why no more was tried."""
    best: dict[str, Any]
    pick: str
    """What the best was chosen by: an objective, or balanced."""
    front: list[dict[str, Any]]
    """The trials that no other equals in all objectives and beats in one."""
    scores: dict[str, dict[str, float | None]]

    def shown(self) -> Iterable[Table | Note]:
        if len(self.objectives) > 1:
            names = list(self.front[0]["scores"])
            rows = [
                (trial["trial"], _said(trial), *(f"{trial['scores'][name]:.6g}" for name in names))
                for trial in self.front
            ]
            yield Table(("trial", "no other is better in all of", *names), rows, texts=2)
        parts = list(self.scores["best"])
        yield Table(
            ("recipe", *parts),
            [
                (what, *(None if (score := found[part]) is None else f"{score:.6g}" for part in parts))
                for what, found in self.scores.items()
            ],
        )
        by = f", by {self.pick}" if len(self.objectives) > 1 else ""
        yield Note(f"best of {self.trials} trials{by}: {_said(self.best)}")

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        from mergekit_px.learn.search.trials import LOG, read_log
        from mergekit_px.pictures.curves import curves

        head, trials = read_log(folder / LOG)
        scored = [(trial, trial.scores) for trial in trials if trial.scores is not None]
        tried, values = [(trial, scores) for trial, scores in scored if trial.values], self.best["values"]
        for name in (objective["name"] for objective in head["objectives"]):
            line = [(float(trial.number), scores[name]) for trial, scores in scored]
            best = (self.best["trial"], "best")
            yield curves(name, "trial; 0 is the recipe as written", {name: line}, joined=False, marked=best)
            for place, variable in enumerate(head["variables"]):
                line = [(trial.values[place], scores[name]) for trial, scores in tried]
                at = (values[variable], "best") if values else None
                yield curves(f"{name} by {variable}", variable, {name: line}, joined=False, marked=at)


def _said(trial: dict[str, Any]) -> str:
    return f"--set {' '.join(trial['set'])}" if trial["set"] else "the recipe as written"
