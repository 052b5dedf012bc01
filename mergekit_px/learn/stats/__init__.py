"""Statistics of a model on data that merges read: Fisher information, Gram matrices, the use of experts.

They are written as one safetensors file: ``NAME.fisher`` in the shape of tensor NAME, ``NAME.gram`` as (n, n) for the
(m, n) weight NAME of a linear layer, ``MODULE.frequency`` and ``MODULE.reap`` with a number for each expert
of it. All float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.stats.settings import StatsReport, StatsSettings


@learner("StatsSettings", "StatsReport", form="file")
def stats(run: Run[StatsSettings]) -> StatsReport:
    """Measure Fisher information, Gram matrices or the use of experts on data.

    The file goes to the methods fisher and regmean, after the models and in their order, or to moe edit. A report with
    hashes, seed and sums stands beside it with the suffix .json.

    Examples:
      pxmerge stats ./math --data math.npz -o math-statistics.safetensors
      pxmerge stats ./math --data math.jsonl -o math-statistics.safetensors --what fisher --labels sampled
      pxmerge stats ./mixture --data texts.jsonl -o experts.safetensors --what experts
      pxmerge fisher --sources ./math ./code math-statistics.safetensors code-statistics.safetensors
    """
    from mergekit_px.learn.stats.run import fit

    return fit(run)
