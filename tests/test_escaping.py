"""Text of strangers cannot steer a terminal, and JSON stays JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest

from mergekit_px.cli._output import Column, Output, write_error_line
from mergekit_px.escaping import escaped, escaped_json, escaped_line

_UNSAFE = ["\x1b]0;t\x07", "\x9b31m", "\r", "\x7f", "\u202e", "\u2066", "\u2028", "\ud800", "\U000e0041"]


@pytest.mark.parametrize("text", _UNSAFE)
def test_unsafe_characters_are_spelled_out(text: str) -> None:
    for made in (escaped(text), escaped_line(text)):
        assert made.isprintable() and made != text
    assert json.loads(escaped_json(json.dumps([text], ensure_ascii=False))) == [text]


def test_letters_of_all_languages_stay() -> None:
    text = "größe 模型 नमूना 🙂 \u200dא\n\tend"
    assert escaped(text) == text
    assert escaped_line("a\nb\tc") == "a\\nb\\tc"


@pytest.mark.parametrize("text", _UNSAFE)
def test_nothing_unsafe_reaches_a_stream(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    sink = Output()
    sink.text(text)
    sink.raw(text)
    sink.heading(text)
    sink.table([Column("name"), Column("[bold]x[/]")], [(text, "[red]no markup[/red]")])
    sink.pairs([(text, text)])
    sink.note(text)
    sink.warning(text)
    write_error_line(text)
    Output("json").document({text: text})
    out, err = capsys.readouterr()
    assert text not in out and text not in err
    assert "[red]no markup[/red]" in out and "[bold]x[/]" in out


def test_json_is_valid_on_a_stream_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", errors="backslashreplace"))
    Output("json").document({"größe": "模型\x9b"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"größe": "模型\x9b"}
