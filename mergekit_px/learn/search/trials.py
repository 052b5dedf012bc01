"""The log of a search: one JSON line for each trial. What it holds is not tried again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.errors import InputError, OutputError, WriteError
from mergekit_px.learn.search.objectives import Metrics, Objective
from mergekit_px.small_files import read_small_file

Values = tuple[float, ...]

LOG = "trials.jsonl"
"""In the folder of a search."""

_OVER = "start with --overwrite"


@dataclass(frozen=True, slots=True)
class Trial:
    """Attributes:
    number: in the order in which trials were asked for.
    values: of the variables; empty for the recipe as it is written.
    scores: as the command, the data or the harness gave them; None where the merge or an objective was not finite.
    """

    number: int
    values: Values
    scores: Metrics | None
    seconds: float


def is_log(text: str) -> bool:
    """Whether a file begins as the log of a search does."""
    return text.lstrip().startswith('{"search"')


def read_log(path: Path) -> tuple[dict[str, Any], list[Trial]]:
    """The first line and the trials of a finished log. Raises ``InputError`` where it is none."""
    return _parsed(_text(path), path, "give trials.jsonl of a search, or a line of JSON for each point")


def trial_head(identity: str, variables: Sequence[str], objectives: Sequence[Objective]) -> dict[str, Any]:
    """The first line of a log."""
    return {"search": identity, "variables": list(variables), "objectives": [asdict(one) for one in objectives]}


class TrialLog:
    """Trials of one search, kept in a file that is added to in the order in which they end.

    Args:
        path: read if it exists.
        head: of the search; a log of another is refused.

    Raises:
        OutputError: the log of another search.
        InputError: not a log.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._head = head
        self._known: dict[Values, Trial] = {}
        if path.exists():
            self._read()
        else:
            self._append(head)

    @property
    def trials(self) -> list[Trial]:
        """All, in the order in which they were asked for."""
        return sorted(self._known.values(), key=lambda trial: trial.number)

    def find(self, values: Sequence[float]) -> Trial | None:
        """The trial of these values, if there was one."""
        return self._known.get(tuple(values))

    def add(self, trial: Trial) -> None:
        """Keep a trial. It is on the disk when this returns. Raises ``WriteError``."""
        self._append(asdict(trial))
        self._known[trial.values] = trial

    def write_ordered(self, path: Path) -> None:
        """Write the log with its trials in the order in which they were asked for. Raises ``WriteError``."""
        lines = [self._head, *map(asdict, self.trials)]
        try:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error

    def remove(self) -> None:
        """Take the file away, and its folder if nothing else is in it."""
        self._path.unlink(missing_ok=True)
        if not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

    def _read(self) -> None:
        text = _text(self._path)
        complete = text[: text.rfind("\n") + 1]
        if not complete:  # killed before the first line was whole
            self._path.unlink()
            self._append(self._head)
            return
        head, trials = _parsed(complete, self._path, _OVER)
        if head != self._head:
            raise OutputError(
                "the unfinished search there is another: the recipe, its inputs or the options changed since",
                where=str(self._path),
                hint="go back to them, or start over with --overwrite",
            )
        self._known = {trial.values: trial for trial in trials}
        if complete != text:  # a line that was cut off when the power went
            self._path.write_text(complete, encoding="utf-8")

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"the disk refused: {error.strerror or error}", where=str(self._path)) from error


def _text(path: Path) -> str:
    try:
        return read_small_file(path, limit=LARGEST_INDEX).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("not the log of a search", where=str(path), hint=_OVER) from None


def _parsed(text: str, path: Path, hint: str) -> tuple[dict[str, Any], list[Trial]]:
    try:
        head, *lines = [json.loads(line) for line in text.splitlines()]
        trials = [Trial(**{**line, "values": tuple(line["values"])}) for line in lines]
        if not {"search", "variables", "objectives"} <= head.keys():
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError("not the log of a search", where=str(path), hint=hint) from None
    return head, trials
