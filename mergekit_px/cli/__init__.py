"""The command ``pxmerge``: one file for each verb; nothing imports this package."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mergekit_px.cli.app import main

__all__ = ["main", "run"]


_COLLECTED_AFTER = 50_000
"""New objects after which the interpreter looks for circles among them. With its own 700 it looks a hundred times while
modules are imported, a tenth of the time that the program takes to start."""
_LAST_STEPS = (
    ("mergekit_px.learn.search.score", "stop_programs"),
    ("mergekit_px.learn.search.scratch", "remove_folders"),
)
"""What would outlive a process that is ended by a signal, and the function that ends it, where the module is loaded."""


def run() -> NoReturn:
    """The program itself: :func:`main`, then straight out.

    What matters is on the disk and synced by then, and the interpreter's way out with torch loaded takes half a
    second.
    """
    gc.set_threshold(_COLLECTED_AFTER)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program, whose words then go nowhere
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _terminated)
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
    for name, last_step in _LAST_STEPS:
        module = sys.modules.get(name)
        if module is not None:
            getattr(module, last_step)()
    os._exit(128 + number)
