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
