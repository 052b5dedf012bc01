"""JSON from untrusted files: one strict reader, and names made safe to print."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from mergekit_px.errors import MalformedCheckpointError

_SHOWN_LENGTH = 200


def shown(text: str) -> str:
    """``text`` as it may stand in a message: no control characters, no endless names."""
    if len(text) > _SHOWN_LENGTH:
        text = text[:_SHOWN_LENGTH] + "..."
    return text if text.isprintable() else ascii(text)


def parse_object(raw: bytes, where: str, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in ``raw``, which must be UTF-8.

    ``strict`` also refuses what JSON forbids or leaves open and Python lets through: duplicate keys, NaN,
    infinities, unpaired surrogates. Raises ``MalformedCheckpointError``.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedCheckpointError(f"the text is not UTF-8 at byte {error.start}", where=where) from None
    try:
        if strict:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        else:
            value = json.loads(text)
        if strict and "\\u" in text:
            # An unpaired surrogate can only come from an escape; no file can be written with such a name.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DuplicateKeyError as error:
        raise MalformedCheckpointError(f"the key {shown(error.key)} occurs twice", where=where) from None
    except RecursionError:
        raise MalformedCheckpointError("the JSON is nested too deeply", where=where) from None
    except UnicodeEncodeError:
        raise MalformedCheckpointError("the JSON holds an unpaired surrogate", where=where) from None
    except ValueError as error:
        raise MalformedCheckpointError(f"not valid JSON: {shown(str(error))}", where=where) from None
    if not isinstance(value, dict):
        raise MalformedCheckpointError("the JSON is not an object", where=where)
    return value


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
