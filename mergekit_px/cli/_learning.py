"""Progress of what learns or measures: a line every few seconds, nothing with ``--quiet``."""

from __future__ import annotations

import time
from collections.abc import Callable

from mergekit_px.cli._output import Output

INTERVAL = 5.0
"""Seconds between two lines."""


def told(output: Output, clock: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """A function to report progress with: what is being done, how many are done, how many there are."""
    last = clock()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= INTERVAL:
            last = clock()
            output.note(f"{what}: {done} of {total}")

    return tell
