"""Rows of data as people keep them: ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` and ``.parquet``."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, UsageError

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_LONGEST_FIELD = 2**27
"""Characters of one field of a ``.csv`` file; the module's own limit is less than a long text."""


@dataclass(frozen=True)
class Table:
    """Rows, each a mapping from columns to values, and for messages the file and the line of each row."""

    rows: list[Row]
    lines: list[int]
    where: str

    def columns(self) -> list[str]:
        """Of all rows, in the order in which they come."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[Any]:
        """One value of each row.

        Raises:
            InputError: a row without it.
        """
        for row, line in zip(self.rows, self.lines, strict=True):
            if row.get(name) is None:
                known = self.columns()
                raise InputError(
                    f"line {line} has no {shown(name)}; the columns are {shown(', '.join(known))}",
                    where=self.where,
                    hint=None if name in known else f"say which column holds it: --columns {name}=COLUMN",
                )
        return [row[name] for row in self.rows]


def read_table(path: Path, where: str) -> Table:
    """The rows of a file.

    Raises:
        InputError: it cannot be read, or holds something else.
        UsageError: ``.parquet`` without the package that reads it.
    """
    if path.suffix == ".parquet":
        return _parquet(path, where)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", where=where, hint="save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=where) from error
    if path.suffix in (".csv", ".tsv"):
        table = _separated(text, "\t" if path.suffix == ".tsv" else ",", where)
    elif path.suffix == ".json":
        table = _array(text, where)
    else:
        table = _lines(text, where)
    if not table.rows:
        raise InputError("it holds no examples", where=where)
    return table


def _lines(text: str, where: str) -> Table:
    rows: list[Row] = []
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_object(line, where, number))
            lines.append(number)
    return Table(rows, lines, where)


def _object(line: str, where: str, number: int) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"line {number} is no JSON: {shown(str(error))}", where=where) from None
    except _TwiceError as error:
        raise InputError(f"line {number} has {shown(str(error))} twice", where=where) from None
    if not isinstance(row, dict):
        raise InputError(f"line {number} is no JSON object with columns", where=where, hint='as {"text": "..."}')
    return row


class _TwiceError(Exception):
    """A name that a JSON object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _array(text: str, where: str) -> Table:
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {shown(str(error))}", where=where, hint="JSON lines end in .jsonl") from None
    except _TwiceError as error:
        raise InputError(f"a row has {shown(str(error))} twice", where=where) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("no list of JSON objects with columns", where=where, hint="JSON lines end in .jsonl")
    return Table(rows, list(range(1, len(rows) + 1)), where)


def _separated(text: str, separator: str, where: str) -> Table:
    before = csv.field_size_limit(_LONGEST_FIELD)
    rows: list[Row] = []
    lines = []
    try:
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter=separator, strict=True)
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the first line names the column {shown(twice)} twice", where=where)
        for row in reader:
            if None in row:
                raise InputError(f"line {reader.line_num} has more fields than the first line has columns", where=where)
            rows.append({name: value for name, value in row.items() if value is not None})
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}", where=where) from None
    finally:
        csv.field_size_limit(before)
    return Table(rows, lines, where)


def _parquet(path: Path, where: str) -> Table:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            ".parquet files need pyarrow", where=where, hint='run: pip install "pxmerge[parquet]", or give .jsonl'
        )
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table as read

    try:
        rows = read(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"not a readable .parquet file: {shown(str(error).splitlines()[0])}", where=where) from error
    if not rows:
        raise InputError("it holds no examples", where=where)
    return Table(rows, list(range(1, len(rows) + 1)), where)
