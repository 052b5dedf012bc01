"""``pxmerge advise``: what to try first with some models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import OutputError

if TYPE_CHECKING:
    from mergekit_px.inspection.advice import Advice

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Two models or adapters, or more: folders, files, org/name.")
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The model that all of them were fine-tuned from.")
]
File = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="A new file for the recipe; printed if left out.")
]


def advise(
    models: Models,
    base: Base = None,
    output: File = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say what models are to one another, what to try first with them, and give the recipe to begin with.

    The models are read once: how far each moved from the base, how alike the changes are, how often they differ in
    sign, how much of the rank they fill and how far they share a subspace (a sample of matrices), and whether their
    tokens agree. The fine-tunes of docs/quality.md that are most like them give the order of the methods, each with
    what it kept there. Every statement has its number, and what was never measured is said. The recipe plans.

    \b
    Examples:
      pxmerge advise ./math ./code ./law --base ./base
      pxmerge advise ./math ./code --base ./base -o recipe.yaml
      pxmerge advise ./math-lora ./code-lora --base ./base --json
    """
    from mergekit_px.inspection.models import advise as ask

    if output is not None and output.exists():
        raise OutputError("the file is there already", where=str(output), hint="give another with -o, or remove it")
    sink = output_for(json=json, quiet=quiet)
    with progress_on(sink) as advance:
        advice = ask(models, base=base, allow_pickle=allow_pickle, progress=advance)
    sink.document(advice)
    for note in advice.notes:
        sink.note(f"note: {note}")
    _show(advice, sink)
    if output is None:
        sink.heading("Recipe to begin with")
        sink.text(advice.recipe.rstrip("\n"))
    else:
        with replacement(output) as file:
            file.write(advice.recipe.encode())
        sink.text(str(output))
    return 0


def _show(advice: Advice, sink: Output) -> None:
    found = advice.relations
    sink.heading(f"Against {found.base or found.sources[0].reference}")
    sink.table(
        [Column("model"), Column("change", "right"), Column("cosine of weights", "right"), Column("rank", "right")],
        [
            (source.reference, _percent(source.relative), _number(source.cosine), _percent(source.rank_share))
            for source in found.sources
        ],
    )
    sink.heading("What follows")
    for statement in advice.statements:
        source = f" [{statement.evidence}]" if statement.evidence else ""
        if sink.is_human:
            sink.text(f"- {statement.text}{source}")
    sink.heading(f"What such methods kept in `{advice.suite}`, percent of the fine-tunes' accuracy")
    sink.table(
        [Column("method"), Column("scale", "right"), Column("kept", "right"), Column("")],
        [
            *(
                (one.options, f"{one.scale:g}", f"{one.score:.1f}", "" if one.level else "behind")
                for one in advice.methods
            ),
            ("(the base alone)", "", f"{advice.pretrained:.1f}", ""),
        ],
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
