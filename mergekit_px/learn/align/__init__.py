"""A task vector of one model, turned so that it fits another (few-shot orthogonal alignment, arXiv 2505.12021).

Beside it two routes that train nothing: least-squares maps between the activations of both models (Theseus, arXiv
2602.12952) and masks by the signs of gradients (GradFix, arXiv 2510.09658).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.align.settings import AlignReport, AlignTask
    from mergekit_px.learn.life import Run


@learner("AlignTask", "AlignReport", output="aligned")
def align(run: Run[AlignTask]) -> AlignReport:
    """Transport a task vector to another model, by rotations learned from a few examples (arXiv 2505.12021).

    The result is a task vector for the base, the model that it makes, the rotations or permutations, and a
    report that holds the controls: the base without it, the task vector as it is, a random one of the same
    norms, and few-shot fine-tunes on the same examples. Read it before the model: where two models are unrelated,
    rotations are only another way to fine-tune.

    Examples:
      pxmerge align --source-base ./a --source-model ./a-ft --base ./b --data few.npz -o aligned
      pxmerge align --task-vector ./tau --base ./b --data few.npz --route gradfix
      pxmerge align --source-base ./a --source-model ./a-ft --base ./b --route permutation
      pxmerge align --task-vector ./tau2 --base ./b --maps ./aligned -o other
    """
    from mergekit_px.learn.align.run import fit

    return fit(run)
