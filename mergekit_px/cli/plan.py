"""``pxmerge plan``: what a recipe would do."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from mergekit_px.cli._merge import merge_file
from mergekit_px.cli._options import Locked, RecipeFile, RunOptions
from mergekit_px.errors import UsageError

_MOST_WORKERS = 100_000

Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N,N", help="Also say what each of 1,8,64 workers would do, and in what time at least."
    ),
]


def plan(recipe: RecipeFile, options: RunOptions, workers: Workers = None, locked: Locked = False) -> int:
    """Say what a recipe would read, compute and write, and refuse here what cannot work.

    Prints the inputs with their commits and dtypes, the steps, the tensors that are merged, copied, missing or
    dropped, the output's files, peak memory, disk, bytes moved and the least time. Only headers are read; of models
    on the Hub nothing else is downloaded. With --locked, commits, sizes and headers are held against the lock file.

    \b
    Examples:
      pxmerge plan recipe.yaml
      pxmerge plan recipe.yaml --memory 2GB --json
      pxmerge plan recipe.yaml --shard-size 1GB --workers 1,8,64
    """
    return merge_file(recipe, replace(options, dry_run=True), workers=parse_workers(workers), locked=locked)


def parse_workers(text: str | None) -> list[int]:
    """Numbers of workers, as in ``1,8,64``. Raises ``UsageError``."""
    words = [] if text is None else text.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= _MOST_WORKERS for word in words):
        raise UsageError(
            f"--workers: '{text}' is no list of numbers from 1 to {_MOST_WORKERS:,}", hint="write it as 1,8,64"
        )
    return [int(word) for word in words]
