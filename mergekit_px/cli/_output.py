"""The one place that prints. Commands say what there is to say; this decides where and how.

stdout carries data and nothing else: tables for people, or one JSON document with ``--json``. Everything else
(notes, warnings, errors, progress) goes to stderr, and with ``--quiet`` only errors do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

Mode = Literal["human", "json", "quiet"]

NARROW = 72
"""Below so many columns only the essential is shown."""

Alignment = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. Columns that are not ``essential`` are left out where the terminal is narrow."""

    title: str
    align: Alignment = "left"
    essential: bool = True


class Output:
    """A sink in one of three modes.

    ``human`` prints tables and notes, ``json`` one document on stdout at the end (and notes on stderr), ``quiet``
    only the result itself.
    """

    def __init__(self, mode: Mode = "human") -> None:
        self.mode = mode

    @property
    def is_human(self) -> bool:
        return self.mode == "human"

    def text(self, text: str) -> None:
        """A line of data on stdout, in human and quiet mode."""
        if self.mode != "json":
            sys.stdout.write(f"{text}\n")

    def raw(self, text: str) -> None:
        """Data on stdout exactly as it is, in every mode: a recipe, a schema."""
        sys.stdout.write(text)

    def document(self, document: Any) -> None:
        """The result for programs: one JSON document on stdout, in json mode only."""
        if self.mode == "json":
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")

    def heading(self, text: str) -> None:
        """A title over what follows, in human mode only."""
        if self.is_human:
            from rich.text import Text

            self._draw("", Text(text, style="bold"))

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
        """Rows under titles, in human mode only. Cells are folded, never cut short."""
        if not self.is_human:
            return
        from rich.table import Table
        from rich.text import Text

        is_narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < NARROW
        shown = [index for index, column in enumerate(columns) if column.essential or not is_narrow]
        table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for index in shown:
            table.add_column(Text(columns[index].title), justify=columns[index].align, overflow="fold")
        for row in rows:
            table.add_row(*(Text("" if row[index] is None else str(row[index])) for index in shown))
        self._draw(table)

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Names with their values, one to a line, in human mode only; None is left out."""
        if not self.is_human:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in pairs:
            if value is not None:
                table.add_row(Text(name, style="bold"), Text(str(value)))
        self._draw(table)

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if self.mode != "quiet":
            write_error_line(text)

    def warning(self, text: str) -> None:
        """Something that may not be meant, on stderr."""
        if self.mode != "quiet":
            write_error_line(f"warning: {text}")

    def _draw(self, *renderables: RenderableType) -> None:
        from rich.console import Console

        # A pipe has no width: every row stays on its line, for grep and the like.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 4000
        console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(*renderables, sep="\n")
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def output_for(*, json: bool = False, quiet: bool = False) -> Output:
    """The sink for the flags ``--json`` and ``--quiet``; with both, the document is all that is printed."""
    if json:
        return Output("json")
    return Output("quiet" if quiet else "human")


def write_error_line(text: str) -> None:
    """One line on stderr. A reader that has gone away does not stop the work."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        pass
