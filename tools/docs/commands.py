"""docs/cli.md, a page in docs/cli/ for each command, and the list in the README: what the program itself prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from unittest.mock import patch

from mergekit_px.cli import main
from mergekit_px.cli._commands import GROUPS, METHODS, USUAL, Command, own_commands
from mergekit_px.learn import load_learners
from mergekit_px.learn.declare import Learner
from mergekit_px.methods.declare import Method
from tools.docs.markdown import docstring, table
from tools.docs.methods import is_own, own_methods

_BUILT_IN = '''"""Where each merge method and learner of the package is declared, and its one line. Made by `make docs`.

So a name is known, and a list of names is printed, without importing any declaration but the one that is asked for.
"""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Declared(NamedTuple):
    module: str
    summary: str
'''

_INTRODUCTION = """# Commands

Data goes to stdout, everything else to stderr. Exit codes are listed under [errors](errors.md).
An option that takes several values takes them after one flag (`--sources a b c`) or with the flag repeated.

"""


def commands_page() -> str:
    """The overview: ``pxmerge --help``, and all commands by group with links to their pages."""
    return f"{_INTRODUCTION}{_help([])}\n{command_tables('cli/', every_method=True)}"


def command_pages() -> dict[str, str]:
    """The page of each command, by its file name."""
    return {
        page_name(command): f"# pxmerge {command.name}\n\n{_help(command.name.split())}"
        for command in own_commands().values()
    }


def page_name(command: Command) -> str:
    return f"{command.name.replace(' ', '-')}.md"


def command_tables(folder: str, *, every_method: bool = False) -> str:
    """A table for each group of commands, which link to the pages in ``folder``."""
    parts = []
    for group in GROUPS:
        rows = [
            (f"[`pxmerge {command.name}`]({folder}{page_name(command)})", docstring(command.summary))
            for command in own_commands().values()
            if command.group == group and (every_method or group != METHODS or command.name in USUAL)
        ]
        if group == METHODS and not every_method:
            rows.append(("[all methods](docs/methods.md)", "`pxmerge methods` lists them by family."))
        if rows:
            parts.append(table((group, ""), rows))
    return "\n".join(parts)


def built_in_module() -> str:
    """The source of ``mergekit_px.declare.built_in``, laid out as the formatter would."""
    learners = {name: learner for name, learner in load_learners().items() if is_own(learner)}
    return f"{_BUILT_IN}\n\n{_declared('METHODS', own_methods())}\n{_declared('LEARNERS', learners)}"


def _declared(title: str, declarations: Mapping[str, Method | Learner]) -> str:
    lines = [f"{title}: Mapping[str, Declared] = {{"]
    for name, declared in declarations.items():
        words = [json.dumps(word, ensure_ascii=False) for word in (declared.origin, declared.summary)]
        line = f'    "{name}": Declared({", ".join(words)}),'
        short = (
            [line] if len(line) <= 120 else [f'    "{name}": Declared(', *(f"        {w}," for w in words), "    ),"]
        )
        lines += short
    return "\n".join([*lines, "}"]) + "\n"


def _help(words: list[str]) -> str:
    return f"```text\n{_output([*words, '--help'])}```\n"


def _output(words: list[str]) -> str:
    with _plain_terminal(), contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = main(words)
    if code != 0:
        raise RuntimeError(f"pxmerge {' '.join(words)} ended with exit code {code}")
    return "".join(f"{line.rstrip()}\n" for line in stdout.getvalue().splitlines())


@contextlib.contextmanager
def _plain_terminal() -> Iterator[None]:
    with patch.dict(os.environ, {"COLUMNS": "100", "LINES": "50", "NO_COLOR": "1"}):
        yield
