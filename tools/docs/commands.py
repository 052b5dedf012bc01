"""docs/cli.md, a page in docs/cli/ for each command, and the list in the README: what the program itself prints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from unittest.mock import patch

from mergekit_px.cli import main
from mergekit_px.cli._commands import GROUPS, METHODS, USUAL, Command, all_commands
from mergekit_px.learn import load_learners
from mergekit_px.methods.declare import method_slug
from tools.docs.markdown import docstring, table
from tools.docs.methods import own_methods

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
        page_name(command): f"# pxmerge {command.name}\n\n{_help(command.name.split())}" for command in own_commands()
    }


def page_name(command: Command) -> str:
    return f"{command.name.replace(' ', '-')}.md"


def command_tables(folder: str, *, every_method: bool = False) -> str:
    """A table for each group of commands, which link to the pages in ``folder``."""
    parts = []
    for group in GROUPS:
        rows = [
            (f"[`pxmerge {command.name}`]({folder}{page_name(command)})", docstring(command.summary))
            for command in own_commands()
            if command.group == group and (every_method or group != METHODS or command.name in USUAL)
        ]
        if group == METHODS and not every_method:
            rows.append(("[all methods](docs/methods.md)", "`pxmerge methods` lists them by family."))
        if rows:
            parts.append(table((group, ""), rows))
    return "\n".join(parts)


def own_commands() -> list[Command]:
    """The commands of the package itself, without those of installed plug-ins."""
    own = {method_slug(name) for name in own_methods()}
    own |= {name for name, learner in load_learners().items() if learner.origin.startswith("mergekit_px.")}
    return [command for command in all_commands().values() if command.place is not None or command.name in own]


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
