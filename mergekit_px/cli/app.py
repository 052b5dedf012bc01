"""The command line: words in, exit code out.

Only the command that was asked for is imported. Typer parses the words; the command itself runs outside Typer, so
that its errors are handled in one place.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import IO, Annotated, Any

import typer
from typer.core import TyperCommand

from mergekit_px._version import __version__
from mergekit_px.cli._arguments import expand_lists
from mergekit_px.cli._commands import GROUPS, METHODS, USUAL, Command, all_commands, spoken_command, spoken_name
from mergekit_px.cli._errors import PROGRAM, explain
from mergekit_px.cli._options import ARGUMENTS, LEARNING, MERGE, METHOD, OPTIONS, OUTPUT, RUN, list_options
from mergekit_px.cli._output import write_error_line
from mergekit_px.cli._plugins import load_plugins
from mergekit_px.cli._prose import plain, terminal_width

PANELS = (ARGUMENTS, MERGE, METHOD, LEARNING, OUTPUT, RUN, OPTIONS)
"""The order of the headings; options without one stand under ``Options``."""


class GroupedCommand(TyperCommand):
    """A command whose help has a heading for each panel that its options name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = ARGUMENTS if is_argument else getattr(parameter, "rich_help_panel", None) or OPTIONS
                rows.setdefault(panel, []).append(record)
        for panel in PANELS:
            if panel in rows:
                with formatter.section(panel):
                    formatter.write_dl(rows[panel])


_COMPLETION = "_PXMERGE_COMPLETE"
"""Set by the shell while it completes a command line; Typer's name for it."""


_SUMMARY = "Merge models by arithmetic on their checkpoint files."

_EXAMPLES = """Examples:
  pxmerge run recipe.yaml
  pxmerge ties --base ./base --sources ./math ./code"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pxmerge`` with the given words (those of the process if None); returns the exit code, never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # A terminal may not know every letter of a name.
    try:
        words = load_plugins(words)
        code = dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard(stdout)
        return 0
    except SystemExit as stop:
        if sys.stdout is not stdout:  # What Typer does to the streams when it prints help into a closed pipe.
            sys.stdout = stdout
            _discard(stdout)
            return 0
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PXMERGE_DEBUG", "0") not in ("", "0"):
            import traceback

            traceback.print_exception(error)
        code, line = explain(error, words, spoken_name(words))
        write_error_line(line)
        return code


def dispatch(words: list[str]) -> int:
    """Run the command that the words spell, and return its exit code; errors are raised."""
    words = words or ["--help"]
    found = spoken_command(words)
    if found is None and len(words) == 1 and spoken_name(words):
        words = [*words, "--help"]
    if found is None or _COMPLETION in os.environ:
        app = _whole_app()
    else:
        command, place = found
        function = command.load()
        rest = words[place.stop :]
        if command.group == METHODS and rest and not rest[0].startswith("-"):
            rest = ["--sources", *rest]  # A method takes nothing else by place.
        rest = expand_lists(rest, list_options(function))
        words = [*words[: place.start], *command.name.split(), *rest]
        app = _app()
        _add(app, command, function)
    action = app(words, prog_name=PROGRAM, standalone_mode=False)
    result = action() if callable(action) else action
    return result if isinstance(result, int) else 0


def _app(**settings: Any) -> typer.Typer:
    app = typer.Typer(
        name=PROGRAM,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "terminal_width": terminal_width()},
        **settings,
    )
    app.callback()(_root)
    return app


def _whole_app() -> typer.Typer:
    """All commands: listed by group in the help text, which is why Typer does not list them again."""
    completing = _COMPLETION in os.environ
    commands = all_commands().values()
    epilog = f"`{PROGRAM} COMMAND --help` explains one."
    app = _app(help=_overview(commands), subcommand_metavar="COMMAND ...", epilog=epilog)
    for command in commands:
        if completing:
            _add(app, command, command.load())
        else:
            group, name = _group(app, command)
            group.command(name, help=command.summary, hidden=group is app)(_not_loaded)
    return app


def _add(app: typer.Typer, command: Command, function: Callable[..., Any]) -> None:
    @functools.wraps(function)
    def parsed(**given: Any) -> Callable[[], Any]:
        return functools.partial(function, **given)

    group, name = _group(app, command)
    group.command(name, cls=GroupedCommand, short_help=command.summary)(parsed)


def _group(app: typer.Typer, command: Command) -> tuple[typer.Typer, str]:
    """Where a command is put, and its name there: ``apply`` in the group ``adapter`` of the program."""
    first, _, rest = command.name.partition(" ")
    if not rest:
        return app, first
    known = (info.typer_instance for info in app.registered_groups if info.name == first)
    group = next((group for group in known if group is not None), None)
    if group is None:
        group = typer.Typer(rich_markup_mode=None, help=f"`{PROGRAM} {first} COMMAND --help` explains a command.")
        app.add_typer(group, name=first, hidden=True)
    return group, rest


def _not_loaded() -> None:
    """Stands for a command in lists of names."""


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin", metavar="FILE.PY", help="Methods and learners of your own, from a file; goes with --allow-code."
        ),
    ] = None,
) -> None:
    """Options of ``pxmerge`` itself."""


def _overview(commands: Collection[Command]) -> str:
    """The help text of ``pxmerge``: what it is, and the commands by group."""
    indent = max(len(command.name) for command in commands) + 4
    blocks = [_EXAMPLES]
    for group in GROUPS:
        shown = [command for command in commands if command.group == group]
        heading = f"{group}:"
        if group == METHODS:
            heading = f"{group} (the usual ones; `{PROGRAM} methods` lists all {len(shown)} by family):"
            shown = [command for command in shown if command.name in USUAL]
        blocks.append("\n".join([heading, *(_row(command, indent) for command in shown)]))
    # A paragraph that begins with \b is printed as it is.
    return _SUMMARY + "".join(f"\n\n\b\n{block}" for block in blocks)


def _row(command: Command, indent: int) -> str:
    first, others = f"  {command.name}".ljust(indent), " " * indent
    width = terminal_width() - 2  # Typer indents the whole text by two.
    return textwrap.fill(plain(command.summary), width, initial_indent=first, subsequent_indent=others)


def _discard(stream: IO[str]) -> None:
    """Nobody reads the stream any more: what Python still holds for it goes nowhere instead of failing at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
