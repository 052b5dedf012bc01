"""YAML text to values that know their place.

PyYAML gives the events; scalars are read by the core schema of YAML 1.2 (``no`` is text, ``1e-5`` is a number).
Tags, repeated keys, keys that are not text, several documents and aliases that blow up are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NoReturn

import yaml

from mergekit_px.errors import InputError, InputNotFoundError, RecipeError
from mergekit_px.small_files import read_small_file

LONGEST_TEXT = 1_000_000
"""Characters of a recipe."""
MOST_NODES = 100_000
"""Values of a recipe with every alias written out."""
DEEPEST = 40
"""Levels of nesting."""

Scalar = bool | int | float | str | None

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Scalar] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A point in what the user wrote; without line and column where it has none."""

    origin: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}:{self.column}"


@dataclass(slots=True)
class Node:
    """A value and its place. Mappings also know the places of their keys."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)
    size: int = 1
    depth: int = 1

    def data(self) -> Any:
        """The value alone, as plain Python."""
        if isinstance(self.value, dict):
            return {key: child.data() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.data() for child in self.value]
        return self.value

    def add(self, child: Node) -> None:
        self.size += child.size
        self.depth = max(self.depth, child.depth + 1)
        if self.size > MOST_NODES:
            raise RecipeError(f"more than {MOST_NODES} values, aliases written out", where=str(child.place))
        if self.depth > DEEPEST:
            raise RecipeError(f"nested deeper than {DEEPEST} levels", where=str(child.place))


def mapping(place: Place, entries: dict[str, Node | None], keys: dict[str, Place] | None = None) -> Node:
    """A mapping of the entries that are there; each key stands where its value does unless ``keys`` says where."""
    node = Node({}, place)
    assert isinstance(node.value, dict)
    for key, child in entries.items():
        if child is not None:
            node.add(child)
            node.value[key] = child
            node.keys[key] = (keys or {}).get(key, child.place)
    return node


def sequence(place: Place, entries: list[Node]) -> Node:
    """A list of nodes."""
    node = Node(list(entries), place)
    for child in entries:
        node.add(child)
    return node


def parse_yaml(text: str, origin: str, *, located: bool = True) -> Node:
    """Parse one YAML document. See :func:`parse_documents`.

    Returns:
        The root; its value is None for an empty text.

    Raises:
        RecipeError: anything that is not one well-formed document of plain data.
    """
    first, *others = parse_documents(text, origin, located=located)
    if others:
        raise RecipeError("only one document is allowed, and another one begins here", where=str(others[0].place))
    return first


def parse_documents(text: str, origin: str, *, located: bool = True) -> list[Node]:
    """Parse YAML documents.

    Args:
        origin: what the places of errors begin with.
        located: whether places have line and column.

    Returns:
        The roots, at least one; the value of a root is None for an empty document.

    Raises:
        RecipeError: anything that is not well-formed plain data.
    """
    if len(text) > LONGEST_TEXT:
        raise RecipeError(f"longer than {LONGEST_TEXT} characters", where=origin)
    try:
        return _Builder(text, origin, located).build()
    except yaml.reader.ReaderError as error:
        position = error.position
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        place = Place(origin, line, column) if located else Place(origin)
        raise RecipeError(f"character U+{ord(text[position]):04X} is not allowed", where=str(place)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(origin, mark.line + 1, mark.column + 1) if mark is not None and located else Place(origin)
        raise RecipeError(_syntax_problem(error), where=str(place), hint=_syntax_hint(error)) from None
    except (ValueError, OverflowError):  # PyYAML passes escapes such as \UFFFFFFFF on to chr()
        raise RecipeError("an escape names no character", where=origin) from None


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    problem = (error.problem or "not well-formed").replace("character '\\t'", "a tab")
    return f"not YAML: {problem}" + (f" ({error.context})" if error.context and not error.problem else "")


def _syntax_hint(error: yaml.MarkedYAMLError) -> str | None:
    problem = error.problem or ""
    if "\\t" in problem:
        return "indent with spaces"
    if "mapping values are not allowed" in problem:
        return "put text that contains ': ' in quotes, and check the indentation"
    if "'%'" in problem or "'@'" in problem or "'`'" in problem:
        return "put the text in quotes"
    return None


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that is not closed yet."""

    node: Node
    anchor: str | None
    key: str | None = None
    key_place: Place | None = None
    merging: bool = False
    """Whether the key is a plain ``<<``, which merges another mapping into this one."""
    merged: list[Node] = field(default_factory=list)


class _Builder:
    """Builds nodes from parser events with a stack of its own, so that nesting cannot exhaust Python's."""

    def __init__(self, text: str, origin: str, located: bool) -> None:
        self._loader: Any = yaml.SafeLoader(text)
        self._origin = origin
        self._located = located
        self._stack: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._roots: list[Node] = []

    def build(self) -> list[Node]:
        try:
            while (event := self._loader.get_event()) is not None:
                self._take(event)
        finally:
            self._loader.dispose()
        return self._roots or [Node(None, Place(self._origin))]

    def _take(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._anchors.clear()
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            if event.tag is not None:
                self._fail(f"tags such as {event.tag!r} are not allowed", event, "put text in quotes instead")
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            else:
                if len(self._stack) >= DEEPEST:
                    self._fail(f"nested deeper than {DEEPEST} levels", event)
                empty: list[Node] | dict[str, Node] = {} if isinstance(event, yaml.MappingStartEvent) else []
                self._require_value_place(event)
                self._stack.append(_Open(Node(empty, self._place(event)), event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self._stack.pop()
            if closed.merged:
                _merge(closed)
            self._finish(closed.node, closed.anchor)

    def _scalar(self, event: Any) -> None:
        plain = bool(event.implicit[0])
        parent = self._stack[-1] if self._stack else None
        if parent is not None and isinstance(parent.node.value, dict) and parent.key is None:
            self._key(event, parent)
            return
        value = self._resolve(event) if plain else event.value
        if isinstance(value, str):
            self._check_text(value, event)
        self._finish(Node(value, self._place(event)), event.anchor)

    def _key(self, event: Any, parent: _Open) -> None:
        key = event.value
        self._check_text(key, event)
        assert isinstance(parent.node.value, dict)
        if key in parent.node.value:
            first = parent.node.keys[key]
            self._fail(f"key '{key[:80]}' is given twice", event, f"the first one is at {first}")
        if event.anchor is not None:
            self._anchors[event.anchor] = Node(key, self._place(event))
        parent.key = key
        parent.merging = bool(event.implicit[0]) and key == "<<"
        parent.key_place = self._place(event)

    def _resolve(self, event: Any) -> Scalar:
        text: str = event.value
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text):
            self._fail(f"{text} is not a finite number", event)
        if not _FLOAT.fullmatch(text):
            if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", text):
                return int(text, 0)
            return text
        if _INTEGER.fullmatch(text):
            if len(text) > 40:
                self._fail("a number of more than 40 digits", event, "put text in quotes")
            return int(text)
        number = float(text)
        if not math.isfinite(number):
            self._fail(f"{text} is too large for a number", event)
        return number

    def _check_text(self, text: str, event: Any) -> None:
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._fail("half of a surrogate pair is not a character", event)
        if "\0" in text:
            self._fail("a zero byte is not allowed in text", event)

    def _alias(self, event: Any) -> None:
        if any(frame.anchor == event.anchor for frame in self._stack):
            self._fail(f"alias *{event.anchor} stands inside of what it refers to", event)
        if event.anchor not in self._anchors:
            self._fail(f"alias *{event.anchor} refers to nothing above it", event)
        self._require_value_place(event)
        self._finish(self._anchors[event.anchor], None)

    def _require_value_place(self, event: Any) -> None:
        parent = self._stack[-1] if self._stack else None
        if parent is not None and isinstance(parent.node.value, dict) and parent.key is None:
            self._fail("a key must be plain text", event, "braces and brackets at the start of text need quotes")

    def _finish(self, node: Node, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._stack:
            self._roots.append(node)
            return
        parent = self._stack[-1]
        if isinstance(parent.node.value, list):
            parent.node.add(node)
            parent.node.value.append(node)
            return
        assert isinstance(parent.node.value, dict) and parent.key is not None and parent.key_place is not None
        if parent.merging:
            parent.merged.extend(self._merge_sources(node))
        else:
            parent.node.add(node)
            parent.node.value[parent.key] = node
            parent.node.keys[parent.key] = parent.key_place
        parent.key = parent.key_place = None

    def _merge_sources(self, node: Node) -> list[Node]:
        sources = node.value if isinstance(node.value, list) else [node]
        if not all(isinstance(source.value, dict) for source in sources):
            raise RecipeError("'<<' merges mappings, and this is something else", where=str(node.place))
        return sources

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self._origin, mark.line + 1, mark.column + 1) if self._located else Place(self._origin)

    def _fail(self, what: str, event: Any, hint: str | None = None) -> NoReturn:
        raise RecipeError(what, where=str(self._place(event)), hint=hint)


def _merge(frame: _Open) -> None:
    """Fill in the keys of ``<<``: a mapping's own keys win, then those of the earlier source."""
    assert isinstance(frame.node.value, dict)
    for source in frame.merged:
        assert isinstance(source.value, dict)
        for key, child in source.value.items():
            if key not in frame.node.value:
                frame.node.add(child)
                frame.node.value[key] = child
                frame.node.keys[key] = source.keys[key]


def node_of(data: Any, origin: str) -> Node:
    """Plain Python data as nodes without line and column.

    Raises:
        RecipeError: data that a recipe cannot hold.
    """
    place = Place(origin)

    def convert(value: Any, path: str, level: int) -> Node:
        if level > DEEPEST:
            raise RecipeError(f"nested deeper than {DEEPEST} levels", where=path)
        if value is None or isinstance(value, (bool, int, str)):
            return Node(value, place)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise RecipeError(f"{value} is not a finite number", where=path)
            return Node(float(value), place)
        if isinstance(value, PurePath):
            return Node(str(value), place)
        if isinstance(value, Mapping):
            if odd := next((key for key in value if not isinstance(key, str)), None):
                raise RecipeError(f"key {odd!r} is not text", where=path)
            under = {key: f"{path}: {key}" if path else key for key in value}  # a command line has no name
            return mapping(place, {key: convert(inner, under[key], level + 1) for key, inner in value.items()})
        if isinstance(value, (list, tuple)):
            return sequence(place, [convert(inner, path, level + 1) for inner in value])
        raise RecipeError(f"a {type(value).__name__} cannot stand in a recipe", where=path)

    return convert(data, origin, 1)


def read_text(path: Path, kind: str) -> str:
    """The text of a file.

    Args:
        kind: what the file should be, for messages: ``recipe``.

    Raises:
        RecipeError: there is no such file, or it is none that can be read as UTF-8.
    """
    if path.is_dir():
        raise RecipeError(f"a folder is no {kind}", where=str(path), hint="give the file in it")
    try:
        data = read_small_file(path, limit=4 * LONGEST_TEXT + 4)
    except InputNotFoundError:
        raise RecipeError(f"there is no such {kind}", where=str(path)) from None
    except InputError as error:
        raise RecipeError(error.what, where=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        place = Place(str(path), before.count(b"\n") + 1, column)
        raise RecipeError("not UTF-8 text", where=str(place), hint="save the file as UTF-8") from None
