"""Docstrings as text for a terminal, as wide as it is."""

from __future__ import annotations

import re
import shutil
import textwrap

_ITEM = re.compile(r"(\d+\.|-) ")


def plain(text: str) -> str:
    """On one line, and without the double backticks of docstrings."""
    return " ".join(text.split()).replace("``", "`")


def paragraphs(documentation: str, width: int) -> list[str]:
    """The paragraphs of a docstring, each wrapped to ``width`` columns; list items hang from their number.

    What comes after ``Raises:`` is for callers of the function and left out.
    """
    prose = documentation.partition("\n\nRaises:")[0]
    return ["\n".join(_wrapped(part, width) for part in _items(paragraph)) for paragraph in prose.split("\n\n")]


def _items(paragraph: str) -> list[str]:
    """The paragraph itself, or its items if it is a list."""
    parts: list[str] = []
    for line in paragraph.splitlines():
        if parts and not _ITEM.match(line):
            parts[-1] += f" {line.strip()}"
        else:
            parts.append(line.strip())
    return parts


def _wrapped(part: str, width: int) -> str:
    item = _ITEM.match(part)
    hang = " " * len(item[0]) if item else ""
    return textwrap.fill(plain(part), width, subsequent_indent=hang, break_on_hyphens=False)


def terminal_width() -> int:
    """Columns to write in: those of the terminal, but neither too few to read nor too many."""
    return min(max(shutil.get_terminal_size().columns, 40), 100)
