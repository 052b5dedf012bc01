"""Coefficients of task vectors, one for each model and block of parameters, learned from a little data.

The parametrisation is anisotropic scaling (aTLAS, arXiv 2407.02880); what it is learned by is distillation from the
ensemble of the models (OFASD), labels (aTLAS), the entropy of predictions (AdaMerging, arXiv 2310.02575) or the loss
on data to be forgotten. ``method: anisotropic`` applies what was learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.ofasd.settings import OfasdReport, OfasdSettings


@learner("OfasdSettings", "OfasdReport", output="coefficients")
def ofasd(run: Run[OfasdSettings]) -> OfasdReport:
    """Learn a coefficient for each source and block of parameters, by distilling the sources' ensemble (OFASD).

    The result is a small file of coefficients, a recipe that applies it, and a report: scores on held-out data beside
    those of the base, the plain average, one coefficient for each source, and the ensemble itself. Other objectives
    learn from labels (aTLAS, arXiv 2407.02880), from certainty (AdaMerging, arXiv 2310.02575), or unlearn.

    What is reconstructed rather than published is said in docs/learn-ofasd.md.

    Examples:
      pxmerge ofasd --base ./base --sources ./a ./b ./c --data proxy.jsonl -o coefficients
      pxmerge run coefficients/recipe.yaml -o ./merged
    """
    from mergekit_px.learn.ofasd.run import fit

    return fit(run)
