from __future__ import annotations

import io
import json
import re
import sys

import pytest

from mergekit_px.cli._output import Column, Output, output_for, write_error_line

COLUMNS = [Column("name"), Column("size", "right"), Column("more", essential=False)]
ROWS = [("a", 1, "x"), ("a-long-name", 20, None)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def say_everything(output: Output) -> None:
    output.heading("Title")
    output.table(COLUMNS, ROWS)
    output.pairs([("key", "value"), ("nothing", None)])
    output.text("result")
    output.document({"result": 1})
    output.note("by the way")
    output.warning("careful")


def test_people_get_tables_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Output())
    captured = capsys.readouterr()
    assert captured.out == (
        "\nTitle\nname         size  more\na               1  x\na-long-name    20\nkey  value\nresult\n"
    )
    assert captured.err == "by the way\nwarning: careful\n"


def test_programs_get_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(output_for(json=True))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"result": 1}
    assert captured.err == "by the way\nwarning: careful\n"


def test_quiet_leaves_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(output_for(quiet=True))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("result\n", "")


def test_quiet_programs_get_the_document_alone(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(output_for(json=True, quiet=True))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"result": 1} and captured.err == ""


def test_a_pipe_keeps_each_row_on_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    Output().table([Column("name")], [("x" * 500,)])
    assert capsys.readouterr().out == f"name\n{'x' * 500}\n"


def drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int, rows: list[tuple[object, ...]]) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "20")
    Output().table(COLUMNS, rows)
    lines = re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


def test_columns_that_do_not_fit_are_left_out_if_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn_on_a_terminal(monkeypatch, 62, [("a" * 50, 1, "x" * 10)])
    assert lines == [f"name{' ' * 46}  size", f"{'a' * 50}     1"]


def test_a_narrow_terminal_gets_a_list_and_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.self_attn.q_proj.weight.with.a.long.tail"
    lines = drawn_on_a_terminal(monkeypatch, 40, [(name, 1, "x"), ("b", 2, None)])
    assert lines == [name[:40], name[40:], "  size: 1", "  more: x", "b", "  size: 2"]


def test_square_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table([Column("[bold]x")], [("[red]y[/red] :smile:",)])
    assert capsys.readouterr().out == "[bold]x\n[red]y[/red] :smile:\n"


def test_a_reader_of_stderr_that_went_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    write_error_line("hello")


def test_what_is_said_of_a_written_result_leaves_stdout_to_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Output(writes=True)
    sink.table(COLUMNS, [("a", 1, "x")])
    sink.text("folder")
    printed = capsys.readouterr()
    assert printed.out == "folder\n"
    assert printed.err.split()[-3:] == ["a", "1", "x"]
