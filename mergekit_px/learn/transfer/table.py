"""The comparison as a table for people, from the report as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = (
    "Experimental. Values are on test data that no choice was made on. A difference is the mean over seeds of paired"
    " differences, with their standard deviation and t, the mean over its standard error."
)

TITLES = {"transfer": "with transfer", "none": "without", "sham": "sham source", "dense": "without, no factors"}


def table_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Titles, then a row for each transfer and model; columns that no row fills are left out."""
    rows = [["transfer", "model", "metric", *TITLES.values(), "transfer - without", "transfer - sham"]]
    for name, transfer in document["transfers"].items():
        for one in transfer["comparisons"]:
            metric = "accuracy %" if one["metric"] == "accuracy" else one["metric"]
            arms = [_value(one["arms"].get(arm)) for arm in TITLES]
            differences = [_difference(one["transfer_minus"].get(arm)) for arm in ("none", "sham")]
            rows.append([name, one["model"], metric, *arms, *differences])
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]


def explanation(document: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    count, telling = len(document["seeds"]), document["telling_t"]
    if telling is None:
        return f"{NOTE} One seed says nothing of the spread."
    return f"{NOTE} With {count} seeds, |t| below {telling} shows nothing."


def markdown_table(document: Mapping[str, Any]) -> str:
    """The table and its explanation."""
    rows = table_rows(document)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", explanation(document)]) + "\n"


def _value(arm: Mapping[str, Any] | None) -> str:
    if arm is None:
        return ""
    return f"{arm['mean']:.4g}" + (f" ({arm['sd']:.2g})" if arm["sd"] is not None else "")


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    spread = f" (sd {difference['sd']:.2g}, t {difference['t']:+.1f})" if difference["t"] is not None else ""
    return f"{round(difference['mean'], 6):+.3g}{spread}"
