"""Text that others wrote, made safe to print: what would steer a terminal or hide its meaning is spelled out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

_UNSAFE = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls: escape sequences, bell, carriage return
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # controls of the reading direction
    r"\u2028\u2029\ufff9-\ufffb"  # other ends of lines, annotations
    r"\ud800-\udfff"  # half a character: names that are not UTF-8, broken JSON escapes
    r"\U000e0000-\U000e007f"  # invisible tags
)
_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_IN_LINE = re.compile(rf"[\n\t{_UNSAFE}]")


def escaped(text: str) -> str:
    r"""``text`` with unsafe characters as ``\x1b``, ``\u202e``; ends of lines and tabs stay."""
    return _IN_TEXT.sub(_spelled, text)


def escaped_line(text: str) -> str:
    r"""``text`` as a single line: ends of lines and tabs are spelled out as well."""
    return _IN_LINE.sub(_spelled, text)


def escaped_json(text: str) -> str:
    r"""A JSON document that says the same, with unsafe characters as ``\u001b``. They can only be inside strings."""
    return _IN_TEXT.sub(_json_escape, text)


def _spelled(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Titles and texts as a table for notebooks."""
    cells = "".join(f"<tr><th>{escape(title)}</th><td>{escape(escaped_line(text))}</td></tr>" for title, text in rows)
    return f"<table>{cells}</table>"
