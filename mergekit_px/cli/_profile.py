"""``--profile``: where the time of a command went, on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mergekit_px.cli._output import write_error_line
from mergekit_px.stages import StageTime, measured


@contextmanager
def profiled(asked: bool) -> Iterator[None]:
    """Measure what is done inside and print a table of it, also where it fails."""
    if not asked:
        yield
        return
    with measured() as stages:
        try:
            yield
        finally:
            for line in _lines(stages.rows(), stages.seconds):
                write_error_line(line)


def _lines(rows: Sequence[StageTime], seconds: float) -> Iterator[str]:
    processor = sum(row.processor for row in rows)
    yield f"{'stage':<12}{'processor s':>12}{'share':>8}{'waiting s':>12}"
    for row in rows:
        share = row.processor / processor if processor else 0.0
        yield f"{row.stage:<12}{row.processor:>12.2f}{share:>8.0%}{row.waiting:>12.2f}"
    yield f"{'all':<12}{processor:>12.2f}{1:>8.0%}"
    used = os.times()
    yield (
        f"{processor:.2f} s of processor time ({used.user:.2f} user, {used.system:.2f} system), start included,"
        f" and {seconds:.2f} s of time after the start; waiting is summed over threads"
    )
