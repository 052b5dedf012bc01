"""How rows of text are read: options of commands beside the learners that take data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.learn.declare import TextSettings

if TYPE_CHECKING:
    from mergekit_px.learn.text_data import TextOptions


@dataclass(frozen=True, slots=True)
class TextColumns:
    """The fields of `TextSettings`, for a command whose function is written by hand."""

    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="ROLE=COLUMN...",
            help="Which column is text, text_pair, label, prompt, completion or messages.  [default: so named]",
        ),
        Several("--columns", "assignments"),
    ] = None
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="N", min=2, help="Cut texts to so many tokens.")
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="DIR", help="Where the tokenizer is.  [default: beside the model]"),
    ] = None

    def options(self) -> TextOptions:
        """Raises ``UsageError`` for a word without a role or a column."""
        columns = tuple(self.columns or ())
        return TextSettings(columns=columns, max_length=self.max_length, tokenizer=self.tokenizer).text
