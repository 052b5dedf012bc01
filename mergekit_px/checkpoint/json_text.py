"""JSON from untrusted files: one reader, and names made safe to print."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from mergekit_px.checkpoint.file_kind import kind_of_bytes
from mergekit_px.errors import MalformedCheckpointError
from mergekit_px.small_files import LARGEST_SMALL_FILE, read_small_file

MAX_DEPTH = 100
"""Levels of lists and objects in each other. Configurations have about ten; Python's own limit is near 1,000, and
differs between its parts."""

_SHOWN_LENGTH = 200


_START = 200
"""Characters by which a file that is no JSON is known."""


def shown(text: str) -> str:
    """``text`` as it may stand in a message: no control characters, no endless names."""
    if len(text) > _SHOWN_LENGTH:
        text = text[:_SHOWN_LENGTH] + "..."
    return text if text.isprintable() else ascii(text)


def read_object(
    path: Path,
    where: str | None = None,
    *,
    strict: bool = True,
    folder: Path | None = None,
    limit: int = LARGEST_SMALL_FILE,
) -> dict[str, Any]:
    """The JSON object in a small file. Raises as ``read_small_file`` and ``parse_object`` do."""
    where = str(path) if where is None else where
    return parse_object(read_small_file(path, where, folder=folder, limit=limit), where, strict=strict)


def parse_object(raw: bytes | str, where: str, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in ``raw``, which must be UTF-8, nested at most ``MAX_DEPTH`` deep.

    ``strict`` also refuses what JSON forbids or leaves open and Python lets through: duplicate keys, NaN,
    infinities, unpaired surrogates. Raises ``MalformedCheckpointError``.
    """
    value = parse_json(raw, where, strict=strict)
    if not isinstance(value, dict):
        raise MalformedCheckpointError("the JSON is not an object", where=where)
    if depth(value) > MAX_DEPTH:
        raise MalformedCheckpointError(f"the JSON is nested more than {MAX_DEPTH} deep", where=where)
    return value


def parse_json(raw: bytes | str, where: str, *, strict: bool = True) -> Any:
    """As ``parse_object``, for any value, of any depth that Python can read."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedCheckpointError(f"the text is not UTF-8 at byte {error.start}", where=where) from None
    try:
        if not strict:
            return json.loads(text)
        # Only where there is one: a function called for each number would slow down large headers.
        whole = _whole_number if "-0" in text else None
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=whole,
            parse_float=_finite,
        )
        if "\\u" in text:
            # An unpaired surrogate can only come from an escape; no file can be written with such a name.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except _DuplicateKeyError as error:
        raise MalformedCheckpointError(f"the key {shown(error.key)} occurs twice", where=where) from None
    except RecursionError:
        raise MalformedCheckpointError("the JSON is nested too deeply", where=where) from None
    except UnicodeEncodeError:
        raise MalformedCheckpointError("the JSON holds an unpaired surrogate", where=where) from None
    except ValueError as error:
        kind = kind_of_bytes(text[:_START].encode()) if text and text.lstrip()[:1] not in "{[" else None
        if kind is not None and not kind.name.startswith("a text file"):
            raise MalformedCheckpointError(f"this is {kind.name}", where=where, hint=kind.hint) from None
        raise MalformedCheckpointError(f"not valid JSON: {shown(str(error))}", where=where) from None


def depth(value: Any) -> int:
    """How many lists and objects are in each other: 0 for a number, 1 for a list of numbers."""
    deepest, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        deepest += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return deepest


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _whole_number(text: str) -> int | float:
    # JSON has a negative zero, which is no whole number: no count may be written so.
    return -0.0 if text == "-0" else int(text)
