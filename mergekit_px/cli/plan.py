"""``pxmerge plan``: what a recipe would do."""

from __future__ import annotations

from dataclasses import replace

from mergekit_px.cli._merge import merge_file
from mergekit_px.cli._options import Locked, RecipeFile, RunOptions


def plan(recipe: RecipeFile, options: RunOptions, locked: Locked = False) -> int:
    """Say what a recipe would read, compute and write, and refuse here what cannot work.

    Prints the inputs with their commits and dtypes, the steps, the tensors that are merged, copied, missing or
    dropped, the output's files, peak memory, disk, bytes moved and the least time. Only headers are read; of models
    on the Hub nothing else is downloaded. With --locked, commits, sizes and headers are held against the lock file.

    \b
    Examples:
      pxmerge plan recipe.yaml
      pxmerge plan recipe.yaml --memory 2GB --json
    """
    return merge_file(recipe, replace(options, dry_run=True), locked=locked)
