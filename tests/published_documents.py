"""Documents that commands print with ``--json`` are held to the published schema, in whatever test they are printed."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any

PUBLISHED = json.loads((Path(__file__).parents[1] / "docs" / "output.schema.json").read_text(encoding="utf-8"))


@functools.cache
def validator(command: str) -> Any:
    """Of the documents of a command; None for one of a plug-in."""
    import jsonschema

    schema = PUBLISHED["properties"].get(command)
    return schema and jsonschema.Draft202012Validator({**schema, "$defs": PUBLISHED["$defs"]})


class _Copied:
    """A stream, and a copy of what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.copy = ""

    def write(self, text: str) -> int:
        self.copy += text
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hold_to_the_schema() -> None:
    """From now on, what a command prints as a document is validated as soon as it is printed."""
    from mergekit_px.cli import app
    from mergekit_px.cli._output import Output

    commands: list[str | None] = []
    dispatch, plain = app.dispatch, Output.document

    def dispatched(words: list[str]) -> int:
        found = app.spoken_command(words)
        commands.append(None if found is None else found[0].name)
        try:
            return dispatch(words)
        finally:
            commands.pop()

    def document(self: Output, *given: Any) -> None:
        printed = _Copied(sys.stdout)
        with contextlib.redirect_stdout(printed):
            plain(self, *given)
        command = commands[-1] if commands else None
        if command is not None and printed.copy and (known := validator(command)) is not None:
            known.validate(json.loads(printed.copy))

    app.dispatch, Output.document = dispatched, document  # type: ignore[method-assign, assignment]
