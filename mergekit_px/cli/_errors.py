"""From an error to an exit code and one line that says what, where, why and what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import typer

from mergekit_px.cli._extras import extra_of
from mergekit_px.errors import PxmergeError, WriteError
from mergekit_px.escaping import escaped_line

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


_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((\S+?)\)?(?: |$)")
_BOUND = re.compile(r"Invalid value for '(.+?)': Input should be (.+?)(?:, unable to parse .*)?")
_BOUNDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid number": "a number",
}
"""The words of the parser of options -> those of all other messages."""


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
        text = _renamed(error) or _surplus(error, words) or _worded(" ".join(error.format_message().split()))
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
    if isinstance(error, OSError) and error.strerror:
        where = f"{escaped_line(str(error.filename))}: " if error.filename is not None else ""
        return WriteError.exit_code, f"error: {where}the system refuses: {error.strerror}"
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"error: unexpected {' '.join(what.split())}; PXMERGE_DEBUG=1 shows the traceback"


def _worded(text: str) -> str:
    """A message of the parser of options, whose bounds speak of its input."""
    found = _BOUND.fullmatch(text)
    if found is None:
        return text.replace("Value error, ", "")
    bound = found[2]
    for theirs, ours in _BOUNDS.items():
        bound = bound.replace(theirs, ours)
    return f"{found[1]} must be {bound}"


def _surplus(error: typer.TyperException, words: Sequence[str]) -> str | None:
    """What is said of a word that stands after an option of several values and is none of them."""
    found = _EXTRA.match(error.format_message())
    context = getattr(error, "ctx", None)
    if found is None or context is None or found[1] not in words:
        return None
    before = [word.partition("=")[0] for word in words[: words.index(found[1])] if word.startswith("--")]
    lists = {
        flag: each.metavar or ""
        for each in context.command.params
        if getattr(each, "multiple", False)
        for flag in each.opts
    }
    if not before or before[-1] not in lists:
        return None
    metavar = lists[before[-1]]
    kind = "numbers" if "X..." in metavar else "assignments" if "=" in metavar else "other values"
    return f"'{found[1]}' is out of place: {before[-1]} takes {kind}, one after another"


def _renamed(error: typer.TyperException) -> str | None:
    """What is said of an option that the command has under another name."""
    typed = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    name = _OTHER_NAMES.get(typed or "")
    known = {flag for parameter in context.command.params for flag in parameter.opts} if context is not None else ()
    return f"No such option: {typed} (it is called {name})" if name in known else None
