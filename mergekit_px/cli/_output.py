"""The one place that prints. Commands say what there is to say; this decides where and how.

stdout carries data and nothing else: tables for people, or one JSON document with ``--json``; of a command that writes
a file the path alone, so that a shell can take it. Everything else (notes, warnings, errors, progress, and what such a
command says of its result) goes to stderr, and with ``--quiet`` only errors do.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.escaping import escaped, escaped_json, escaped_line

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType
    from rich.table import Table

Mode = Literal["human", "json", "quiet"]

_ENDLESS = 4000

_NARROW = 60
"""Columns of a terminal below which a table that does not fit becomes a list."""

Alignment = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. One that is not ``essential`` is left out where the table is wider than the terminal."""

    title: str
    align: Alignment = "left"
    essential: bool = True


class Output:
    """A sink in one of three modes.

    ``human`` prints tables and notes, ``json`` one document on stdout at the end (and notes on stderr), ``quiet``
    only the result itself.
    """

    def __init__(self, mode: Mode = "human", *, notes: bool = True, writes: bool = False) -> None:
        self.mode = mode
        self.writes = writes
        """Whether the result is a path, beside which tables are no data."""
        self.has_notes = notes and mode != "quiet"
        """Whether anything but data and errors is said: notes, warnings, progress."""

    @property
    def is_human(self) -> bool:
        return self.mode == "human"

    def text(self, text: str) -> None:
        """A line of data on stdout, in human and quiet mode."""
        if self.mode != "json":
            sys.stdout.write(f"{escaped(text)}\n")

    def raw(self, text: str) -> None:
        """Data on stdout exactly as it is, in every mode: a recipe, a schema."""
        sys.stdout.write(escaped(text))

    def document(self, document: Any, kind: type[BaseModel] | None = None) -> None:
        """The result for programs: one JSON document on stdout, in json mode only.

        ``kind``: the class whose published schema it holds to.
        """
        if self.mode == "json":
            if kind is not None:
                document = kind.model_validate(document)
            if hasattr(document, "model_dump"):
                document = document.model_dump(mode="json", exclude_unset=True)
            text = escaped_json(json.dumps(document, indent=2, ensure_ascii=False, default=str)) + "\n"
            if not _can_write(text):
                text = json.dumps(document, indent=2, default=str) + "\n"
            sys.stdout.write(text)

    def heading(self, text: str) -> None:
        """A title over what follows, in human mode only."""
        if self.is_human:
            from rich.text import Text

            self._draw("", Text(escaped_line(text), style="bold"))

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
        """Rows under titles, in human mode only. Cells are folded, never cut short.

        Where a table is too wide, columns that are not essential are left out; on a terminal so narrow that this
        does not help, each row is printed as a short list.
        """
        if not self.is_human:
            return
        cells = [["" if cell is None else escaped(str(cell)) for cell in row] for row in rows]
        width = self._console().width
        every = range(len(columns))
        essential = [index for index in every if columns[index].essential]
        if _natural_width(columns, cells, every) <= width:
            self._draw(_table(columns, cells, every))
        elif _natural_width(columns, cells, essential) <= width or width >= _NARROW:
            self._draw(_table(columns, cells, essential))
        else:
            for row in cells:
                self._print("\n".join(_record(columns, row, width)) + "\n")

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
                table.add_row(Text(escaped_line(name), style="bold"), Text(escaped(str(value))))
        self._draw(table)

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if self.has_notes:
            write_error_line(text)

    def warning(self, text: str) -> None:
        """Something that may not be meant, on stderr."""
        if self.has_notes:
            write_error_line(f"warning: {text}")

    def _console(self) -> Console:
        from rich.console import Console

        # A pipe has no width: every row stays on its line, for grep and the like.
        stream = sys.stderr if self.writes else sys.stdout
        width = None if stream.isatty() or "COLUMNS" in os.environ else _ENDLESS
        return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)

    def _draw(self, *renderables: RenderableType) -> None:
        console = self._console()
        with console.capture() as capture:
            console.print(*renderables, sep="\n")
        self._print("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))

    def _print(self, text: str) -> None:
        (sys.stderr if self.writes else sys.stdout).write(text)


def _can_write(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _natural_width(columns: Sequence[Column], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    """Columns of the terminal that a table needs without folding: two between its own."""
    longest = [max(len(text) for text in (columns[index].title, *(row[index] for row in rows))) for index in shown]
    return sum(longest) + 2 * (len(longest) - 1)


def _record(columns: Sequence[Column], row: Sequence[str], width: int) -> list[str]:
    """One row as lines: its first cell, then the others with their titles, indented."""
    lines = textwrap.wrap(row[0], width) or [""]
    for column, cell in zip(columns[1:], row[1:], strict=True):
        if cell:
            text = f"{column.title}: {cell}"
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index in shown:
        table.add_column(Text(columns[index].title), justify=columns[index].align, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table


def output_for(*, json: bool = False, quiet: bool = False, writes: bool = False) -> Output:
    """The sink for the flags ``--json`` and ``--quiet``; with both, the document is all that is printed."""
    return Output("json" if json else "quiet" if quiet else "human", notes=not quiet, writes=writes)


def write_error_line(text: str) -> None:
    """One line on stderr. A reader that has gone away does not stop the work."""
    try:
        sys.stderr.write(f"{escaped(text)}\n")
        sys.stderr.flush()
    except OSError:
        pass
