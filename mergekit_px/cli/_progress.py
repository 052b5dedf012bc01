"""Progress on stderr: a live bar on a terminal, else a plain line every ten seconds, nothing with ``--quiet``."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mergekit_px.cli._output import Output, write_error_line
from mergekit_px.cli._units import show_bytes, show_rate, show_seconds

Advance = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all; from any thread."""

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines."""

_NARROW = 72
"""Columns below which the bar gives way to the figures."""


@contextmanager
def progress_on(output: Output) -> Iterator[Advance]:
    """A function to report progress with, while the block runs."""
    if not output.has_notes:
        yield lambda phase, done, total: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _live() as advance:
            yield advance
    else:
        yield _Lines().advance


@contextmanager
def _live() -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    phase = TextColumn("{task.description}", markup=False)
    columns = [phase, BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    if console.width < _NARROW:
        columns = [TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        current = ""

        def advance(phase: str, done: int, total: int) -> None:
            nonlocal current
            if phase != current:
                current = phase
                bar.reset(task, total=total, completed=done, description=phase)
            else:
                bar.update(task, completed=done, total=total)

        yield advance


class _Lines:
    """A line like ``merging: 34%, 1.5 GB of 4.4 GB, 210 MB/s, 14 s left`` every ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phase = ""
        self._phase_began = 0.0
        self._first = 0
        self._told = clock()

    def advance(self, phase: str, done: int, total: int) -> None:
        with self._lock:
            now = self._clock()
            if phase != self._phase:
                self._phase, self._phase_began, self._first = phase, now, done
            if now - self._told < PLAIN_INTERVAL:
                return
            self._told = now
            line = self._line(done, total, now - self._phase_began)
        write_error_line(line)

    def _line(self, done: int, total: int, seconds: float) -> str:
        parts = [f"{100 * done // total}%, {show_bytes(done)} of {show_bytes(total)}"] if total else [show_bytes(done)]
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        if rate > 0:
            parts.append(show_rate(rate))
            if total > done:
                parts.append(f"{show_seconds((total - done) / rate)} left")
        return f"{self._phase}: {', '.join(parts)}"
