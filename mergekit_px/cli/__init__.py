"""The command ``pxmerge``: one file for each verb; nothing imports this package."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from mergekit_px.cli.app import main

__all__ = ["main", "run"]


def run() -> NoReturn:
    """The program itself: :func:`main`, then straight out.

    What matters is on the disk and synced by then, and the interpreter's way out with torch loaded takes half a
    second.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
