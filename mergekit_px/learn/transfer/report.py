"""The comparison: transfer against its controls, paired over seeds. As JSON, Markdown and a picture."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.errors import WriteError
from mergekit_px.learn.transfer.arm import ArmResult, Trial
from mergekit_px.learn.transfer.settings import TransferReport
from mergekit_px.learn.transfer.table import NOTE, TITLES, markdown_table

TABLE_FILE, PICTURE_FILE = "report.md", "report.png"

_T_QUANTILES = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Results:
    """A transfer and what came of it: arm -> a result for each seed."""

    trial: Trial
    arms: Mapping[str, Sequence[ArmResult]]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean, standard deviation (n - 1) and t = mean / (sd / sqrt(n)); None where there is none."""
    count = len(values)
    mean = math.fsum(values) / count
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else None
    t = mean / (sd / math.sqrt(count)) if sd else None
    return {"values": list(values), "mean": mean, "sd": sd, "t": t}


def telling_t(seeds: int) -> float | None:
    """The |t| that no difference at all stays below in 95 of 100 studies with so many seeds; None for one seed."""
    return None if seeds < 2 else _T_QUANTILES[min(seeds - 1, len(_T_QUANTILES)) - 1]


def comparisons(results: Results) -> list[dict[str, Any]]:
    """For each model that was scored: the metric by arm, and the paired differences of transfer to each control."""
    trial, found = results.trial, []
    for role in results.arms["transfer"][0].scores:
        entrant = trial.target if role == "target" else trial.source
        values = {
            arm: [result.scores[role]["test"] for result in runs]
            for arm, runs in results.arms.items()
            if all(role in result.scores for result in runs)
        }
        if role == "source" and len(values) == 1:
            continue  # in mode joint the source receives nothing: there is nothing to compare
        arms = {
            arm: {name: value for name, value in summary(one).items() if name != "t"} for arm, one in values.items()
        }
        differences = {
            arm: summary([ours - theirs for ours, theirs in zip(values["transfer"], one, strict=True)])
            for arm, one in values.items()
            if arm != "transfer"
        }
        found.append(
            {
                "role": role,
                "model": entrant.name,
                "metric": entrant.settings.metric,
                "better": entrant.settings.goal,
                "arms": arms,
                "transfer_minus": differences,
            }
        )
    return found


def report_of(seeds: list[int], all_results: Sequence[Results]) -> TransferReport:
    """The whole report."""
    transfers = {}
    for results in all_results:
        trial, first = results.trial, results.arms["transfer"][0]
        transfers[trial.name] = {
            "settings": trial.transfer.model_dump(),
            "models": {entrant.name: entrant.settings.model_dump() for entrant in (trial.target, trial.source)},
            "transfers": first.transfers,
            "selected_steps": [result.selected for result in results.arms["transfer"]],
            "comparisons": comparisons(results),
            "validation": {
                arm: [result.scores["target"]["validation"] for result in runs] for arm, runs in results.arms.items()
            },
            "loss": {arm: runs[0].trace for arm, runs in results.arms.items()},
        }
    return TransferReport(note=NOTE, seeds=seeds, telling_t=telling_t(len(seeds)), transfers=transfers)


def write_report(output: Path, seeds: list[int], all_results: Sequence[Results]) -> TransferReport:
    """Write table and picture (where matplotlib is installed); returns the report.

    Raises:
        WriteError: the disk refuses.
    """
    report = report_of(seeds, all_results)
    document = report.model_dump(mode="json")
    try:
        (output / TABLE_FILE).write_text(markdown_table(document), encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            write_picture(document, output / PICTURE_FILE)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(output)) from error
    return report


def write_picture(document: Mapping[str, Any], path: Path) -> None:
    """A panel for each transfer and model: a column for each arm, a dot for each seed, seeds joined, means as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(name, one) for name, transfer in document["transfers"].items() for one in transfer["comparisons"]]
    figure = Figure(figsize=(1.2 + 3.1 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, one) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        arms = [arm for arm in ("dense", "none", "sham", "transfer") if arm in one["arms"]]
        columns = range(len(arms))
        for values in zip(*(one["arms"][arm]["values"] for arm in arms), strict=True):
            axes.plot(
                columns, values, color="#c9c9c9", linewidth=0.8, marker="o", markersize=4, markerfacecolor="#4d4d4d"
            )
        for column, arm in zip(columns, arms, strict=True):
            mean = one["arms"][arm]["mean"]
            colour = "#b8551f" if arm == "transfer" else "#1b6ca8"
            axes.plot([column - 0.3, column + 0.3], [mean, mean], color=colour, linewidth=2.5, zorder=3)
        axes.set_xticks(columns, [TITLES[arm].replace(", ", ",\n").replace(" ", "\n", 1) for arm in arms])
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_title(f"{name}: {one['model']}", fontsize=10)
        axes.set_ylabel(f"test {one['metric']}" + (" in percent" if one["metric"] == "accuracy" else ""))
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
