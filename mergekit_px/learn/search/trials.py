"""The log of a search: one JSON line for each trial. What it holds is not tried again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.errors import InputError, OutputError, WriteError
from mergekit_px.small_files import read_small_file

Values = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """Attributes:
    values: of the variables; empty for the recipe as it is written.
    score: as the command or the data gave it; None where the merge or its score was not finite.
    """

    number: int
    values: Values
    score: float | None
    seconds: float


class TrialLog:
    """Trials of one search, kept in a file that is added to.

    Args:
        path: read if it exists.
        identity: of the search; a log of another is refused.

    Raises:
        OutputError: the log of another search.
        InputError: not a log.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self.trials: list[Trial] = []
        self._known: dict[Values, Trial] = {}
        if path.exists():
            self._read(identity)
        else:
            self._append({"search": identity})

    def find(self, values: Sequence[float]) -> Trial | None:
        """The trial of these values, if there was one."""
        return self._known.get(tuple(values))

    def add(self, values: Sequence[float], score: float | None, seconds: float) -> Trial:
        """Keep a trial. It is on the disk when this returns. Raises ``WriteError``."""
        trial = Trial(len(self.trials), tuple(values), score, round(seconds, 3))
        self._append(asdict(trial))
        self._keep(trial)
        return trial

    def remove(self) -> None:
        """Take the file away, and its folder if nothing else is in it."""
        self._path.unlink(missing_ok=True)
        if not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

    def _keep(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._known[trial.values] = trial

    def _read(self, identity: str) -> None:
        try:
            text = read_small_file(self._path, limit=LARGEST_INDEX).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError("not the log of a search", where=str(self._path), hint="start with --overwrite") from None
        complete = text[: text.rfind("\n") + 1]
        if not complete:  # killed before the first line was whole
            self._path.unlink()
            self._append({"search": identity})
            return
        try:
            first, *lines = [json.loads(line) for line in complete.splitlines()]
            found = first["search"]
            trials = [Trial(**{**line, "values": tuple(line["values"])}) for line in lines]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError("not the log of a search", where=str(self._path), hint="start with --overwrite") from None
        if found != identity:
            raise OutputError(
                "the unfinished search there is another: the recipe, its inputs or the options changed since",
                where=str(self._path),
                hint="go back to them, or start over with --overwrite",
            )
        for trial in trials:
            self._keep(trial)
        if complete != text:  # a line that was cut off when the power went
            self._path.write_text(complete, encoding="utf-8")

    def _append(self, line: dict[str, object]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"the disk refused: {error.strerror or error}", where=str(self._path)) from error
