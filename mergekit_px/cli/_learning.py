"""What commands that learn or measure share: options, how an interruption ends, and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._errors import Interrupted
from mergekit_px.cli._output import Output
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.learn.text_data import TextOptions

INTERVAL = 5.0
"""Seconds between two lines."""

DATA_HELP = "Texts (.jsonl, .csv, .parquet), a folder of images by class, or arrays (.npz, .safetensors)"
"""What ``--data`` takes, to which a command adds what it needs of them."""

LabelledData = Annotated[str, typer.Option("--data", metavar="FILE", help=f"{DATA_HELP}, with labels.")]


@dataclass(frozen=True, slots=True)
class TextColumns:
    """How rows of text are read: options of every command that takes data."""

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
        from mergekit_px.learn.text_data import TextOptions

        pairs = []
        for word in self.columns or ():
            role, _, column = word.partition("=")
            if not role or not column:
                raise UsageError(f"'{word}' names no column", where="--columns", hint="write text=COLUMN")
            pairs.append((role, column))
        return TextOptions(tuple(pairs), self.max_length, self.tokenizer)


Factory = Annotated[
    str | None, typer.Option("--model", metavar="FILE.PY:FUNCTION", help="Makes the model; needs --allow-code.")
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the function of --model.")]
StepSize = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Examples in a step.")]
PassSize = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Examples of one forward pass.")]
Every = Annotated[int, typer.Option("--evaluate-every", metavar="N", min=1, help="Steps between two validations.")]
ValidationShare = Annotated[float, typer.Option("--validation", metavar="X", min=0, max=1, help="Share that selects.")]
TestShare = Annotated[float, typer.Option("--test", metavar="X", min=0, max=1, help="Share that the report is about.")]
Precision = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option("--precision", help="Of forward and backward passes; nothing else is rounded."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in the output folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]


@contextmanager
def resumable() -> Iterator[None]:
    """Inside, Ctrl-C ends in the words that go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted from error


def told(output: Output, clock: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """A function to report progress with: what is being done, how many are done, how many there are."""
    last = clock()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= INTERVAL:
            last = clock()
            output.note(f"{what}: {done} of {total}")

    return tell
