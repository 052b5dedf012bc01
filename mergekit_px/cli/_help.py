"""Help texts whose options stand under headings: of the method, of any merge, of its output, of the run."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from mergekit_px.cli._options import ARGUMENTS, LEARNING, MERGE, METHOD, OPTIONS, OUTPUT, RUN

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
