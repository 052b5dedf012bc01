"""Knowledge transfer between models of different architectures while they train (MergeNet, arXiv 2404.13322).

    plan        what a plan file may say
    load        YAML -> plan, with the place of every error
    presets     the settings of the paper's experiments; explicit, preset and default values in one
    ranks       tensors as matrices, and the ranks of their factors
    suggest     tensors that can be paired
    digits      built-in models and data to try it on
    objective   losses and metrics by name
    factors     a matrix as B A, trained in its factors, always there as a matrix for the model
    adapter     the low-rank parametric knowledge adapter, and the MLP it is compared with
    attention   attention whose memory has a bound
    exchange    which adapter serves which pair; the update of the adapter
    side        one model that learns: data, loss, optimiser
    arm         one training run: with transfer, without, or with a sham source
    state       what a run needs to go on
    output      trained models as ordinary checkpoints
    run         all arms of a plan over all seeds
    report      the comparison, as JSON, table and picture

A pair exchanges the A factors ("address matrices") of two tensors W = B A. Every ``cycle`` steps the adapter makes
the target's A anew from both; in between, and on that step too, the target learns from its own data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.inputs import Inputs
    from mergekit_px.learn.life import Run
    from mergekit_px.learn.transfer.settings import TransferReport, TransferSettings


def _inputs(settings: TransferSettings) -> Inputs:
    from mergekit_px.learn.transfer.run import open_plan

    return open_plan(settings)


@learner("TransferSettings", "TransferReport", inputs=_inputs, output="as the plan says")
def transfer(run: Run[TransferSettings]) -> TransferReport:
    """Train a model while another hands it knowledge (MergeNet, arXiv 2404.13322). Experimental.

    The two may differ in architecture and task: pairs of their matrices exchange low-rank factors through a small
    attention network, which learns along and is gone in the end. The results are ordinary checkpoints, and a report
    of the metric with transfer, without, and with a source of random numbers, paired over seeds. Gains are not
    promised: read the report before the model.

    The plan is described in docs/transfer.md; `pxmerge pairs plan.yaml` lists the tensors that it can pair.

    Examples:
      pxmerge transfer plan.yaml -o ./transfer --seeds 5
      pxmerge transfer plan.yaml --allow-code --set transfer.cycle=8
      pxmerge transfer plan.yaml --resume
    """
    from mergekit_px.learn.transfer.run import fit

    return fit(run)
