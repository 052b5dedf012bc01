"""``--plugin FILE.py``: merge methods and learners of a file, for this one command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_px.errors import UsageError

_FLAG = "--plugin"
_ALLOW = "--allow-code"


def load_plugins(words: Sequence[str]) -> list[str]:
    """Import the files that a command line names, and return its other words.

    This comes before the words are parsed, since what a plug-in declares are commands themselves.

    Raises:
        UsageError: no ``--allow-code``, no file, or a file that raises or declares nothing.
        InputNotFoundError: no such file.
    """
    rest: list[str] = []
    files: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            rest += [word, *waiting]
        elif word == _FLAG:
            files.append(next(waiting, ""))
        elif word.startswith(f"{_FLAG}="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    if not files:
        return rest
    if _ALLOW not in rest:
        raise UsageError(f"{files[0]} is code, which is not run unless asked for", hint=f"allow it with {_ALLOW}")
    for file in files:
        _load(file)
    from mergekit_px.cli._commands import spoken_command
    from mergekit_px.cli._options import has_option

    command = spoken_command(rest)
    if command is None or not has_option(command[0].load(), "allow_code"):
        rest.remove(_ALLOW)
    return rest


def _load(file: str) -> None:
    from mergekit_px.user_code import import_file

    if not file.endswith(".py"):
        raise UsageError(f"{_FLAG} takes a Python file, not '{file}'", hint=f"write {_FLAG} my_method.py")
    before = _declared()
    module = import_file(Path(file).expanduser())
    declared = _declared()
    if declared.keys() == before.keys() and module.__name__ not in declared.values():
        what = "it declares no merge method and no learner"
        raise UsageError(what, where=file, hint="decorate a function with @merge_method or @learner")


def _declared() -> dict[str, str]:
    """Where each merge method and learner was declared."""
    from mergekit_px.learn import load_learners
    from mergekit_px.methods import load_methods

    methods = {f"method {name}": method.origin for name, method in load_methods().items()}
    return methods | {f"learner {name}": learner.origin for name, learner in load_learners().items()}
