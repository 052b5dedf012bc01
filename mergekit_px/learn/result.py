"""What a learner left, read again: for the page and the JSON of ``pxmerge report``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergekit_px._version import __version__
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.declare.document import Document
from mergekit_px.errors import InputError
from mergekit_px.learn import find_learner
from mergekit_px.learn.declare import Line, Note, Report, Table
from mergekit_px.learn.life import report_file
from mergekit_px.pictures.curves import Curves
from mergekit_px.pictures.heat_map import HeatMap
from mergekit_px.small_files import read_small_file


class LearnedReport(Document):
    """What was learned: the learner's report, and it again as tables, lines and pictures."""

    pxmerge: str
    title: str
    learner: str
    summary: str
    report: dict[str, Any]
    tables: list[Table]
    notes: list[str]
    warnings: list[str]
    heat_maps: list[HeatMap]
    curves: list[Curves]


def learned_report(output: Path) -> LearnedReport | None:
    """The report of a learner's result; None where that is no learner's.

    Raises:
        InputError: a report that this version does not write.
        UsageError: one of a learner that is not installed.
    """
    path = report_file(output)
    try:
        document = json.loads(read_small_file(path, limit=LARGEST_INDEX)) if path.is_file() else None
    except ValueError:
        return None
    if not isinstance(document, dict) or not document.get("learner"):
        return None
    learner = find_learner(str(document["learner"]))
    try:
        report = learner.report.model_validate(document)
        shown, pictures = list(report.shown()), list(report.pictures(path.parent))
    except (ValidationError, LookupError, TypeError, ValueError):
        raise InputError("not a report as this version writes them", where=str(path), hint="learn again") from None
    return _learned(output.resolve().name, learner.summary, report, [*shown, *pictures])


def _learned(title: str, summary: str, report: Report, parts: Iterable[Any]) -> LearnedReport:
    kinds: dict[type[Any], list[Any]] = {}
    for part in parts:
        kinds.setdefault(type(part), []).append(part)
    notes: list[Note] = kinds.get(Note, [])
    return LearnedReport(
        pxmerge=report.versions.get("pxmerge", __version__),
        title=title,
        learner=report.learner,
        summary=summary,
        report=report.model_dump(mode="json"),
        tables=kinds.get(Table, []),
        notes=[line.text for line in kinds.get(Line, [])] + [note.text for note in notes if not note.warning],
        warnings=[note.text for note in notes if note.warning],
        heat_maps=kinds.get(HeatMap, []),
        curves=kinds.get(Curves, []),
    )
