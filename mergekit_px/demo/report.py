"""The demo's scores as a Markdown table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table: test accuracy in percent for each task, and their mean."""

    label: str
    kind: Literal["base", "fine-tune", "merge"]
    command: str | None
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def markdown_table(scores: Sequence[Score]) -> str:
    """One row per checkpoint; accuracies in percent of the test digits."""
    tasks = list(scores[0].accuracy)
    rows = [["", *tasks, "mean"]]
    rows += [[score.label, *(f"{score.accuracy[task]:.1f}" for task in tasks), f"{score.mean:.1f}"] for score in scores]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_data(scores: Sequence[Score], seed: int, path: Path) -> None:
    rows = [
        {
            "label": score.label,
            "kind": score.kind,
            "command": score.command,
            "accuracy": score.accuracy,
            "mean": round(score.mean, 2),
        }
        for score in scores
    ]
    path.write_text(json.dumps({"seed": seed, "unit": "percent", "scores": rows}, indent=2) + "\n", encoding="utf-8")


def read_data(path: Path) -> tuple[int, list[Score]]:
    """The seed and the scores of a demo. Raises ``InputError`` where there is none."""
    if not path.is_file():
        raise InputNotFoundError("there is no demo", where=str(path.parent), hint="make it with `pxmerge demo -o DIR`")
    document = read_object(path)
    try:
        rows = [Score(row["label"], row["kind"], row["command"], row["accuracy"]) for row in document["scores"]]
        return int(document["seed"]), rows
    except (KeyError, TypeError) as error:
        raise MalformedCheckpointError("these are no scores of a demo", where=str(path)) from error


def write_picture(scores: Sequence[Score], path: Path) -> None:
    """A bar for each checkpoint's mean, a mark for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"base": "#c9c9c9", "fine-tune": "#b5cde3", "merge": "#f3c98b"}
    marks = dict(
        zip(scores[0].accuracy, (("o", "#4d4d4d"), ("^", "#1b6ca8"), ("s", "#b8551f"), ("D", "#3a7d44")), strict=False)
    )
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = range(len(scores))
    axes.barh(rows, [score.mean for score in scores], color=[colours[score.kind] for score in scores], height=0.66)
    for task, (mark, colour) in marks.items():
        values = [score.accuracy[task] for score in scores]
        axes.scatter(values, rows, marker=mark, s=28, color=colour, label=task, zorder=3)
    axes.set_yticks(rows, [score.label for score in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlim(0, 105)
    axes.set_xlabel("test accuracy in percent: bar = mean of the four tasks, marks = each task")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=150)
