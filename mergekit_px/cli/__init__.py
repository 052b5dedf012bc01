"""The command ``pxmerge``: one file for each verb; nothing imports this package."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from mergekit_px.cli.app import main

__all__ = ["main", "run"]


def run() -> NoReturn:
    """The program itself: :func:`main`, then straight out.

    What matters is on the disk and synced by then, and the interpreter's way out with torch loaded takes half a
    second.
    """
    signal.signal(signal.SIGTERM, _terminated)
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ranged = sys.modules.get("mergekit_px.checkpoint.ranged")
    if ranged is not None:
        ranged.forget()  # which nobody else does on this way out
    os._exit(code)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    # Straight to the descriptor: the program may be in the middle of a line.
    with contextlib.suppress(OSError):
        os.write(2, b"\nterminated; an unfinished run in an output folder goes on with --resume\n")
    os._exit(128 + number)
