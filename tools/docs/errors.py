"""docs/errors.md: the exception tree and the exit codes."""

from __future__ import annotations

import inspect

from mergekit_px import errors
from tools.docs.markdown import table

_CODES = {
    0: "done",
    1: "something unexpected; a defect",
    2: "a wrong flag, or an invalid recipe",
    3: "an input is missing, unreachable or malformed",
    4: "the plan is refused: shapes, memory, disk or the output folder; nothing was computed",
    5: "the run stopped; `--resume` continues it",
    130: "interrupted with Ctrl-C; `--resume` continues it",
}


def errors_page() -> str:
    """The page. Raises ValueError where an exception has an exit code that the page does not explain."""
    classes = [
        found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, errors.PxmergeError)
    ]
    if unknown := {found.exit_code for found in classes} - _CODES.keys():
        raise ValueError(f"exit codes {sorted(unknown)} are not explained")
    by_code = {
        code: ", ".join(f"`{found.__name__}`" for found in classes if found.exit_code == code) for code in _CODES
    }
    rows = [(str(code), meaning, by_code[code]) for code, meaning in _CODES.items()]
    documentation = inspect.getdoc(errors) or ""
    tree = "\n".join(line[4:] for line in documentation.splitlines() if line.startswith("    "))
    return (
        "# Errors\n\n"
        "A mistake gives one line on stderr, `where: what is wrong; what to do`, and an exit code. "
        "`PXMERGE_DEBUG=1` adds the traceback.\n\n"
        + table(("exit code", "meaning", "exceptions"), rows)
        + f"\nFrom Python, all of them derive from `mergekit_px.errors.PxmergeError`:\n\n```text\n{tree}\n```\n"
    )
