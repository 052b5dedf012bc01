"""``pxmerge demo``: the whole thing on real data, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._output import Output

Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where models and pictures go.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the training.")]


def demo(output: Folder = Path("demo"), seed: Seed = 0) -> int:
    """Train small vision models on real handwritten digits, merge them with every method, and score the results.

    Needs the extra "demo" (transformers, scikit-learn, matplotlib) and no network.

    \b
    Example:
      pxmerge demo -o ./demo
    """
    from mergekit_px.cli.app import main
    from mergekit_px.demo import run_demo

    run_demo(output, seed, main, Output().text)
    return 0
