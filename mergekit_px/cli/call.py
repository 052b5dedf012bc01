"""Any command by one call, for programs and notebooks: arguments are values, and the result is a document."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from mergekit_px.errors import PxmergeError, RunError, UsageError


def run_command(command: str = "", *arguments: Any, **options: Any) -> Any:
    """Run a command of ``pxmerge`` and return what it prints with ``--json``, as dicts and lists.

        px.run_command("average", "run", last=5, output="mean")
        px.run_command("adapter extract", "base", "math", rank=32, output="math-lora")
        px.run_command("svd", sources=["a", "b"], base="base", top_k=64, as_="components", output="pool")

    Args:
        command: its name, as ``adapter merge``.
        arguments: what it takes by place: paths, names, lists of them.
        options: its options by their names, with ``_`` for ``-`` and one more where the name is a word of Python
            (``from_``). True is the flag alone, False the flag that turns it off, None the default; lists are several
            values, mappings ``NAME=VALUE``.

    Returns:
        The document, whose form ``pxmerge schema --of COMMAND`` prints; the text of a command that has none.

    Raises:
        UsageError, RecipeError, InputError, PlanError, RunError: see :mod:`mergekit_px.errors`; messages name options
            as on the command line.
    """
    from mergekit_px.cli._commands import spoken_command
    from mergekit_px.cli._errors import explain
    from mergekit_px.cli._options import has_option
    from mergekit_px.cli.app import dispatch

    if not isinstance(command, str):
        raise UsageError(f"a command is its name, as 'adapter merge', not {type(command).__name__}")
    name = command.split()
    spoken = spoken_command(name)
    if spoken is None or spoken[0].name != command:
        raise UsageError(f"there is no command {command!r}", hint="pxmerge --help lists them")
    function = spoken[0].load()
    words = [*name, *_words("", arguments)]
    negatives = _negatives(function)
    for option, value in options.items():
        words += _option(option, value, negatives)
    if has_option(function, "json") and options.get("json") is None:
        words.append("--json")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            code = dispatch(words)
    except (PxmergeError, KeyboardInterrupt):
        raise
    except Exception as error:
        code, line = explain(error, words, command)
        raise (UsageError if code == UsageError.exit_code else RunError)(line.removeprefix("error: ")) from error
    text = printed.getvalue()
    if not text and code != 0:
        raise RunError(f"it ended with exit code {code}", where=command)
    try:
        return json.loads(text)
    except ValueError:
        return text.rstrip("\n")


def _option(option: str, value: Any, negatives: Mapping[str, str]) -> Iterator[str]:
    """The words of an option; none for one that is left to its default."""
    flag = f"--{option.removesuffix('_').replace('_', '-')}"
    if value is None or value is False:
        if flag not in negatives:
            raise UsageError(f"No such option: {flag}")  # nothing is written that the command could refuse
        if value is False and negatives[flag]:
            yield negatives[flag]
    elif value is True:
        yield flag
    else:
        yield flag
        yield from _words(flag, value)


def _words(flag: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield f"{name}={'null' if part is None else part}"
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _words(flag, part)
    elif isinstance(value, (str, int, float, PathLike)):
        yield str(value)
    else:
        raise UsageError(f"{flag or 'an argument'} is {type(value).__name__}, which no command line can hold")


def _negatives(function: Callable[..., Any]) -> dict[str, str]:
    """The options of a command, each with the flag that turns it off, or nothing."""
    found = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        found[f"--{name.removesuffix('_').replace('_', '-')}"] = ""
        for mark in getattr(parameter.annotation, "__metadata__", ()):
            # Typer keeps the first of an option's names where a default stands outside of annotations.
            for names in (getattr(mark, "default", None), *(getattr(mark, "param_decls", None) or ())):
                if isinstance(names, str):
                    positive, _, negative = names.partition("/")
                    found[positive] = negative
    return found
