"""From an error to an exit code and one line that says what, where, why and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import typer

from mergekit_px.cli._extras import extra_of
from mergekit_px.errors import PxmergeError

PROGRAM = "pxmerge"
INTERRUPTED = 130

_OTHER_NAMES = {
    "--clients": "--sources",
    "--models": "--sources",
    "--target-base": "--base",
    "--lr": "--learning-rate",
    "--rate": "--learning-rate",
    "--decay": "--weight-decay",
    "--epochs": "--steps",
    "--batch-size": "--batch",
    "--compare": "--controls",
    "--no-compare": "--controls",
    "--test-data": "--test",
}
"""What papers and other programs call an option -> what it is called here: no likeness of letters tells that."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C where something can go on later.

    Attributes:
        command: the words that go on; None for the same command line with ``--resume``.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self.command = command
        super().__init__()


def explain(error: BaseException, words: Sequence[str], command: str = "") -> tuple[int, str]:
    """The exit code for an error, and the line that is printed for it.

    Args:
        words: the command line, without the program's name.
        command: the name of its command, or of its group; empty for none.
    """
    if isinstance(error, PxmergeError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, typer.TyperException):
        text = _renamed(error) or " ".join(error.format_message().split()).replace("Value error, ", "")
        usage = f"{PROGRAM} {command}".rstrip()
        return error.exit_code, f"error: {text.rstrip('.')}; see `{usage} --help`"
    if isinstance(error, Interrupted):
        resumed = [*(word for word in words if word not in ("--overwrite", "--resume")), "--resume"]
        return INTERRUPTED, f"interrupted; to go on: {shlex.join([PROGRAM, *(error.command or resumed)])}"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if (extra := extra_of(package)) is not None:
            return 2, f"error: this needs the package {package}; pip install '{PROGRAM}[{extra}]'"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"error: unexpected {' '.join(what.split())}; PXMERGE_DEBUG=1 shows the traceback"


def _renamed(error: typer.TyperException) -> str | None:
    """What is said of an option that the command has under another name."""
    typed = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    name = _OTHER_NAMES.get(typed or "")
    known = {flag for parameter in context.command.params for flag in parameter.opts} if context is not None else ()
    return f"No such option: {typed} (it is called {name})" if name in known else None
