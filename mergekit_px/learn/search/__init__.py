"""Coefficients of a recipe, chosen by a score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.search.settings import SearchReport, SearchSettings


@learner("SearchSettings", "SearchReport", output="searched", continues=True)
def search(run: Run[SearchSettings]) -> SearchReport:
    """Find coefficients of a recipe by a score: a command of yours that prints a number, or accuracy on data.

    Every trial is merged into a folder, scored, and logged; what the log holds is not tried again, and a finished
    search goes on with --resume. The recipe as written is the first trial. The best is merged into DIR/model, and the
    test, which takes no part in the choice, is reported for it and for the recipe as written.

    Examples:
      pxmerge search recipe.yaml --over merge.params.t=0:1 --how golden --score "python score.py {}"
      pxmerge search recipe.yaml --over merge.sources.math=0:1:0.25 merge.sources.code=0:1:0.25 --data dev.npz
      pxmerge search recipe.yaml --over merge.sources.math=0:1 merge.sources.code=0:1 --how cma --data dev.npz --resume
    """
    from mergekit_px.learn.search.run import fit

    return fit(run)
