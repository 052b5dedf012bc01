"""Stage 2 of AXIS (arXiv:2508.19353): the singular values of a merged update are trained, its vectors stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.tune.settings import TuneReport, TuneSettings


@learner("TuneSettings", "TuneReport", output="tuned")
def tune(run: Run[TuneSettings]) -> TuneReport:
    """Train the singular values of a merged update on labelled data (stage 2 of AXIS, arXiv 2508.19353).

    The vectors stay as they are, so a handful of numbers for each matrix is trained, at a cost that does not depend
    on how many models were merged. Values are chosen on validation data; the report has base, components as they
    came, and tuned ones side by side, on test data too.

    Examples:
      pxmerge tune components.safetensors --base ./base --data target.npz -o ./tuned
      pxmerge tune components.safetensors --base ./base --data target.jsonl --top 32 --core --overwrite
      pxmerge tune components.safetensors --base ./base --data target.npz -o ./tuned --resume
    """
    from mergekit_px.learn.tune.run import fit

    return fit(run)
