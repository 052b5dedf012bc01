"""RegMean++ (arXiv 2508.03121): regression means of linear layers, from the lowest layer of a model to the highest.

layers    the layers of a model in the order in which they run, and whose weights are measured in each
run       from models and data to the merged model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.regmean_order.settings import RegmeanOrderReport, RegmeanOrderSettings


@learner("RegmeanOrderSettings", "RegmeanOrderReport", output="merged-in-order", name="regmean-order")
def regmean_order(run: Run[RegmeanOrderSettings]) -> RegmeanOrderReport:
    """Merge models layer by layer, each on what the merged layers below make of the models' data (RegMean++).

    Regression means, as the method regmean makes them of the files of stats, from the lowest layer to the highest. Each
    model's layer is measured on the activations that reach it through the layers that are merged already, and not
    through the model's own. Nothing is trained, and labels are not needed.

    Examples:
      pxmerge regmean-order --sources ./math ./code --data math.jsonl code.jsonl -o merged
      pxmerge regmean-order --sources ./a ./b --data a.npz b.npz --weights 2 1 --examples 256
    """
    from mergekit_px.learn.regmean_order.run import fit

    return fit(run)
