from __future__ import annotations

import io
import re
import sys

import pytest

from mergekit_px.cli._output import Output, output_for
from mergekit_px.cli._progress import _Lines, progress_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_ten_seconds_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = _Lines(clock=lambda: now)
    for second in range(26):
        now = float(second)
        lines.advance("merging", second * 100_000_000, 5_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 20%, 1 GB of 5 GB, 100 MB/s, 40 s left",
        "merging: 40%, 2 GB of 5 GB, 100 MB/s, 30 s left",
    ]


def test_rates_count_from_where_the_phase_began(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = _Lines(clock=lambda: now)
    lines.advance("resuming", 900, 1000)
    now = 10.0
    lines.advance("resuming", 950, 1000)
    assert capsys.readouterr().err == "resuming: 95%, 950 B of 1 kB, 5 B/s, 10 s left\n"


def test_short_work_off_a_terminal_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on(Output()) as advance:
        advance("merging", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("json", [False, True])
def test_quiet_draws_nothing(monkeypatch: pytest.MonkeyPatch, json: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_on(output_for(json=json, quiet=True)) as advance:
        advance("merging", 1, 2)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("columns", ["40", "100"])
def test_a_terminal_gets_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    with progress_on(Output()) as advance:
        advance("merging", 500_000_000, 1_000_000_000)
        advance("publishing", 1_000_000_000, 1_000_000_000)
    drawn = terminal.getvalue()
    assert "100%" in drawn
    assert all(len(line) <= int(columns) for line in _visible(drawn))


def test_a_dumb_terminal_gets_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with progress_on(Output()) as advance:
        advance("merging", 1, 2)
    assert "\x1b" not in terminal.getvalue()


def _visible(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
