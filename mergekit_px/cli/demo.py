"""``pxmerge demo``: the whole thing on real data, in two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._output import Output

Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where models and pictures go.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the training.")]
Scored = Annotated[
    Path | None,
    typer.Option("--score", metavar="DIR", help="Score this merge of the models in -o, and train nothing."),
]


def demo(output: Folder = Path("demo"), seed: Seed = 0, score: Scored = None) -> int:
    """Train small vision models on real handwritten digits, average, merge with every method, and score.

    Needs the extra "demo" (transformers, scikit-learn, matplotlib) and no network.

    With --score, a merge of your own is scored on the same tasks, beside base and fine-tunes.

    \b
    Examples:
      pxmerge demo -o ./demo
      pxmerge demo --score ./merged
    """
    from mergekit_px.cli.app import main
    from mergekit_px.demo import run_demo, score_merge

    if score is not None:
        score_merge(score, output, Output().text)
        return 0
    run_demo(output, seed, main, Output().text)
    return 0
