"""The demo's scores as a Markdown table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError

Kind = Literal["base", "fine-tune", "merge"]


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table, in percent.

    Attributes:
        accuracy: test accuracy on each task.
        normalised: the mean over tasks of accuracy by that of the task's own fine-tune.
        error: the standard error of ``normalised`` over the test digits.
    """

    label: str
    kind: Kind
    command: str | None
    accuracy: dict[str, float]
    normalised: float
    error: float

    @classmethod
    def of(
        cls,
        answers: Mapping[str, NDArray[np.bool_]],
        own: Mapping[str, float],
        label: str,
        kind: Kind,
        command: str | None = None,
    ) -> Score:
        """Score which test digits are right, the same digits in each task, by the accuracies of the fine-tunes."""
        accuracy = {task: round(100.0 * float(right.mean()), 1) for task, right in answers.items()}
        digits = np.mean([100.0 * right / (own[task] / 100.0) for task, right in answers.items()], axis=0)
        error = float(digits.std(ddof=1)) / len(digits) ** 0.5
        return cls(label, kind, command, accuracy, round(float(digits.mean()), 1), round(error, 1))

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class Average:
    """Mean accuracy of a run's checkpoint, and of the mean of the last checkpoints up to it where there are enough."""

    step: int
    checkpoint: float
    average: float | None


@dataclass(frozen=True, slots=True)
class Results:
    """Scores of base, fine-tunes and merges (the best first), each fine-tune's accuracy on its task, and the run."""

    seed: int
    scores: tuple[Score, ...]
    own: dict[str, float]
    averages: tuple[Average, ...]


def markdown_table(scores: Sequence[Score]) -> str:
    """One row per checkpoint; numbers in percent."""
    tasks = list(scores[0].accuracy)
    rows = [["", *tasks, "normalised", "±"]]
    rows += [
        [
            score.label,
            *(f"{score.accuracy[task]:.1f}" for task in tasks),
            f"{score.normalised:.1f}",
            f"{score.error:.1f}",
        ]
        for score in scores
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_data(results: Results, path: Path) -> None:
    document = {"unit": "percent", **asdict(results)}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_data(path: Path) -> Results:
    """The results of a demo. Raises ``InputError`` where there is none."""
    if not path.is_file():
        raise InputNotFoundError("there is no demo", where=str(path.parent), hint="make it with `pxmerge demo -o DIR`")
    document = read_object(path)
    try:
        scores = tuple(Score(**row) for row in document["scores"])
        return Results(
            int(document["seed"]), scores, document["own"], tuple(Average(**row) for row in document["averages"])
        )
    except (KeyError, TypeError) as error:
        raise MalformedCheckpointError("these are no scores of a demo", where=str(path)) from error


def write_picture(scores: Sequence[Score], path: Path) -> None:
    """A bar for each checkpoint's normalised accuracy with its error, a mark for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"base": "#c9c9c9", "fine-tune": "#b5cde3", "merge": "#f3c98b"}
    marks = dict(
        zip(scores[0].accuracy, (("o", "#4d4d4d"), ("^", "#1b6ca8"), ("s", "#b8551f"), ("D", "#3a7d44")), strict=True)
    )
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = range(len(scores))
    axes.barh(
        rows,
        [score.normalised for score in scores],
        xerr=[score.error for score in scores],
        color=[colours[score.kind] for score in scores],
        height=0.66,
        error_kw={"elinewidth": 1.0, "ecolor": "#666666"},
    )
    for task, (mark, colour) in marks.items():
        values = [score.accuracy[task] for score in scores]
        axes.scatter(values, rows, marker=mark, s=28, color=colour, label=task, zorder=3)
    axes.set_yticks(rows, [score.label for score in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlim(0, 105)
    axes.set_xlabel("percent; bar: normalised accuracy with its standard error\nmarks: test accuracy on each task")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=150)


def write_averages(averages: Sequence[Average], path: Path) -> None:
    """The run's checkpoints and their running means by training step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    means = [(row.step, row.average) for row in averages if row.average is not None]
    axes.plot([row.step for row in averages], [row.checkpoint for row in averages], "o-", color="#b8551f")
    axes.plot([step for step, _ in means], [mean for _, mean in means], "s-", color="#1b6ca8")
    count = len(averages) - len(means) + 1
    figure.legend(["each checkpoint", f"mean of the last {count}"], loc="outside upper center", ncols=2, frameon=False)
    axes.set_xlabel("training step")
    axes.set_ylabel("mean test accuracy in percent")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
