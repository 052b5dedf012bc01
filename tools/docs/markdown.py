"""Pieces of Markdown: tables, docstrings, and the marked places of hand-written pages."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_MARK = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def fill(page: str, contents: Mapping[str, str]) -> str:
    """``page`` with the text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: a mark names no content, or a content has no mark.
    """
    marks = [match["name"] for match in _MARK.finditer(page)]
    if set(marks) != set(contents):
        raise ValueError(f"the page marks {sorted(set(marks))}, generated are {sorted(contents)}")
    return _MARK.sub(lambda match: f"{match[1]}\n{contents[match['name']].rstrip()}\n\n{match[3]}", page)


def docstring(documentation: str) -> str:
    """A docstring as Markdown: sections become lists, roles and double backquotes become code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(documentation)).replace("``", "`")
    paragraphs = text.split("\n\n")
    return "\n\n".join(_section(paragraph) for paragraph in paragraphs)


def signature(name: str, function: Callable[..., Any]) -> str:
    """A call with its parameters, annotations as written; one parameter per line if it is long."""
    found = inspect.signature(function)
    parameters = []
    keyword_only = False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        keyword_only = keyword_only or parameter.kind is parameter.VAR_POSITIONAL
        text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}" if ":" in text else f"={parameter.default!r}"
        parameters.append(text)
    result = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\bmergekit_px(\.\w+)*\.", "", text)


def _section(paragraph: str) -> str:
    first, _, rest = paragraph.partition("\n")
    if first.rstrip(":") not in _SECTIONS or not first.endswith(":"):
        return paragraph
    items: list[str] = []
    for line in textwrap.dedent(rest).splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    named = first != "Returns:"
    return f"{first}\n\n" + "\n".join(f"- {_item(item) if named else item}" for item in items)


def _item(item: str) -> str:
    name, colon, text = item.partition(": ")
    return f"`{name}`: {text}" if colon and "`" not in name else item


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
