"""Where each merge method and learner of the package is declared, and its one line. Made by `make docs`.

So a name is known, and a list of names is printed, without importing any declaration but the one that is asked for.
"""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Declared(NamedTuple):
    module: str
    summary: str


METHODS: Mapping[str, Declared] = {
    "actmat": Declared(
        "mergekit_px.methods.actmat",
        "Regression mean with the Gram matrices of the task vectors in place of data (ACTMat).",
    ),
    "add_cosine": Declared(
        "mergekit_px.methods.add_cosine",
        "Take more of the second model where its columns point elsewhere (cosine-adaptive sum, cosine A and B).",
    ),
    "anisotropic": Declared(
        "mergekit_px.methods.anisotropic",
        "Task arithmetic with a learned coefficient for each source and tensor (anisotropic scaling, aTLAS).",
    ),
    "anisotropic_groups": Declared(
        "mergekit_px.methods.anisotropic",
        "Task arithmetic with a learned coefficient for each source and random group of elements (aTLAS).",
    ),
    "arcee_fusion": Declared(
        "mergekit_px.methods.arcee_fusion",
        "A base, the first source, with those elements of a model, the second, whose importance stands out.",
    ),
    "breadcrumbs": Declared(
        "mergekit_px.methods.breadcrumbs",
        "Task arithmetic without the smallest and largest elements of each task vector (Model Breadcrumbs).",
    ),
    "breadcrumbs_ties": Declared(
        "mergekit_px.methods.breadcrumbs",
        "TIES without the smallest and largest elements of each task vector (Model Breadcrumbs).",
    ),
    "cabs": Declared(
        "mergekit_px.methods.cabs",
        "Give each source the places that earlier ones left free (CABS, conflict-aware and balanced sparsification).",
    ),
    "cart": Declared(
        "mergekit_px.methods.cart",
        "Mean of the sources plus the low-rank part of each source's distance to it (CART, centred arithmetic).",
    ),
    "clipping": Declared(
        "mergekit_px.methods.clipping",
        "Average of the task vectors, each limited to a norm (norm clipping of federated learning).",
    ),
    "combine": Declared(
        "mergekit_px.methods.combine",
        "Linear combination of the sources with the weights as they are.",
    ),
    "consensus_ta": Declared(
        "mergekit_px.methods.consensus_ta",
        "Task arithmetic without the elements that fewer than ``tasks`` sources need (TALL masks, Consensus TA).",
    ),
    "dare_linear": Declared(
        "mergekit_px.methods.dare",
        "Task arithmetic on randomly sparsified task vectors (DARE: drop and rescale).",
    ),
    "dare_ties": Declared(
        "mergekit_px.methods.dare",
        "TIES on randomly sparsified task vectors (DARE: drop and rescale).",
    ),
    "dc_merge": Declared(
        "mergekit_px.methods.dc_merge",
        "Balance the strengths of the sources' directions and merge in a shared basis (DC-Merge, directional consistency).",
    ),
    "della": Declared(
        "mergekit_px.methods.della",
        "TIES on task vectors sparsified at random, small elements first (DELLA).",
    ),
    "della_linear": Declared(
        "mergekit_px.methods.della",
        "Task arithmetic on task vectors sparsified at random, small elements first (DELLA).",
    ),
    "emr": Declared(
        "mergekit_px.methods.emr",
        "Element-wise largest change in the direction that the sources agree on (EMR-Merging, elected vector).",
    ),
    "esm": Declared(
        "mergekit_px.methods.esm",
        "Merge the directions in which sources change a layer's outputs on their own inputs (ESM, essential subspaces).",
    ),
    "expo": Declared(
        "mergekit_px.methods.expo",
        "Extrapolate from a base beyond one model that was aligned from it (ExPO, model extrapolation).",
    ),
    "fedgma": Declared(
        "mergekit_px.methods.fedgma",
        "Average of the task vectors, damped where the sources disagree in sign (FedGMA, gradient masking).",
    ),
    "fednova": Declared(
        "mergekit_px.methods.fednova",
        "Average of the task vectors, normalised by the number of training steps (FedNova).",
    ),
    "fisher": Declared(
        "mergekit_px.methods.fisher",
        "Fisher-weighted averaging: each parameter counts by how much the predictions depend on it.",
    ),
    "geometric_median": Declared(
        "mergekit_px.methods.geometric_median",
        "Geometric median of the models, by Weiszfeld's iteration (robust federated averaging).",
    ),
    "iso_c": Declared(
        "mergekit_px.methods.isotropic",
        "Flatten the singular values of the summed task vectors (isotropic merging, Iso-C).",
    ),
    "iso_cts": Declared(
        "mergekit_px.methods.isotropic",
        "Isotropic merging of common and task-specific subspaces (Iso-CTS).",
    ),
    "karcher": Declared(
        "mergekit_px.methods.karcher",
        "Karcher (Riemannian) mean of the models on the sphere, at the mean of their norms.",
    ),
    "knots": Declared(
        "mergekit_px.methods.knots",
        "TIES in the left singular basis that the sources share (KnOTS, knowledge orientation through SVD).",
    ),
    "linear": Declared("mergekit_px.methods.linear", "Weighted average of the sources (a model soup)."),
    "localize_and_stitch": Declared(
        "mergekit_px.methods.localize_and_stitch",
        "Keep each source's largest changes, and average where they overlap (Localize-and-Stitch, data-free).",
    ),
    "magmax": Declared(
        "mergekit_px.methods.magmax",
        "For each parameter keep the change of largest magnitude (MagMax).",
    ),
    "median": Declared("mergekit_px.methods.median", "Element-wise median of the task vectors."),
    "metagpt": Declared(
        "mergekit_px.methods.metagpt",
        "Task arithmetic weighted by the squared norms of the task vectors (MetaGPT).",
    ),
    "model_stock": Declared(
        "mergekit_px.methods.model_stock",
        "Interpolate between base and average by the angle between the fine-tunes (Model Stock).",
    ),
    "multislerp": Declared(
        "mergekit_px.methods.multislerp",
        "Spherical interpolation of any number of models, in the tangent space at their mean (multi-SLERP).",
    ),
    "multislerp_deltas": Declared(
        "mergekit_px.methods.multislerp",
        "Base plus the spherical interpolation of any number of task vectors (multi-SLERP).",
    ),
    "nearswap": Declared(
        "mergekit_px.methods.nearswap",
        "Move the base towards the source by at most ``t`` in each element (NearSwap).",
    ),
    "nuslerp": Declared(
        "mergekit_px.methods.nuslerp",
        "Spherical interpolation between two models by their weights (NuSLERP).",
    ),
    "nuslerp_deltas": Declared(
        "mergekit_px.methods.nuslerp",
        "Base plus the spherical interpolation between two task vectors (NuSLERP).",
    ),
    "opcm": Declared(
        "mergekit_px.methods.opcm",
        "Add source after source, each free of the leading directions so far (OPCM, continual merging by projection).",
    ),
    "ortho_merge": Declared(
        "mergekit_px.methods.ortho_merge",
        "Merge the rotations of the base in their Lie algebra, and what is left by its mean (OrthoMerge).",
    ),
    "passthrough": Declared("mergekit_px.methods.passthrough", "Copy the source, or a multiple of it."),
    "pcb": Declared(
        "mergekit_px.methods.pcb",
        "Weigh each element by its size in its task and its agreement with others (PCB, parameter competition balancing).",
    ),
    "ram": Declared(
        "mergekit_px.methods.ram",
        "Average the elements that several sources change, keep whole those that only one does (Reinforced Agent Merging).",
    ),
    "ram_plus": Declared(
        "mergekit_px.methods.ram",
        "RAM with the elements that only one source changes strengthened, the more the others dilute that source (RAM+).",
    ),
    "regmean": Declared(
        "mergekit_px.methods.regmean",
        "Match each layer's outputs by least squares on the models' own inputs (RegMean).",
    ),
    "res_merge": Declared(
        "mergekit_px.methods.res_merge",
        "Mean direction of the sources' tails, with heads added as far as they agree (ResMerge, residual merging).",
    ),
    "sce": Declared(
        "mergekit_px.methods.sce",
        "Merge the elements of highest variance, weighted by each source's energy, where signs agree (SCE).",
    ),
    "slerp": Declared("mergekit_px.methods.slerp", "Spherical interpolation between two models (SLERP)."),
    "star": Declared(
        "mergekit_px.methods.star",
        "Mean of the sources' low-rank parts, rescaled to their nuclear norm (STAR, spectral truncation and rescale).",
    ),
    "subspace_boosting": Declared(
        "mergekit_px.methods.subspace_boosting",
        "Raise the small singular values of a sum of task vectors, or of one merge (Subspace Boosting).",
    ),
    "svc": Declared(
        "mergekit_px.methods.svc",
        "Calibrate the singular values of a merge by those of its sources (SVC, singular value calibration).",
    ),
    "svd": Declared(
        "mergekit_px.methods.svd",
        "Pool the rank-one components of all sources and keep the K largest of each matrix (AXIS).",
    ),
    "task_arithmetic": Declared(
        "mergekit_px.methods.task_arithmetic",
        "Base plus the weighted sum of the task vectors (task arithmetic).",
    ),
    "ties": Declared(
        "mergekit_px.methods.ties",
        "Trim each task vector, elect a sign for each element, merge the values that agree (TIES).",
    ),
    "train_difference": Declared(
        "mergekit_px.methods.train_difference",
        "A model with what another has learned beyond their base, damped where it is near it already (SuperMerger).",
    ),
    "tsv_m": Declared(
        "mergekit_px.methods.tsv_m",
        "Orthogonalise the leading singular vectors of the sources and sum them (TSV-M, task singular vectors).",
    ),
    "wudi": Declared("mergekit_px.methods.wudi", "Minimise the interference between task vectors without data (WUDI)."),
}

LEARNERS: Mapping[str, Declared] = {
    "align": Declared(
        "mergekit_px.learn.align",
        "Transport a task vector to another model, by rotations learned from a few examples (arXiv 2505.12021).",
    ),
    "ofasd": Declared(
        "mergekit_px.learn.ofasd",
        "Learn a coefficient for each source and block of parameters, by distilling the sources' ensemble (OFASD).",
    ),
    "tune": Declared(
        "mergekit_px.learn.tune",
        "Train the singular values of a merged update on labelled data (stage 2 of AXIS, arXiv 2508.19353).",
    ),
    "search": Declared(
        "mergekit_px.learn.search",
        "Find coefficients of a recipe by a score: a command of yours that prints a number, or accuracy on data.",
    ),
    "stats": Declared(
        "mergekit_px.learn.stats",
        "Measure Fisher information, Gram matrices or the use of experts on data.",
    ),
    "regmean-order": Declared(
        "mergekit_px.learn.regmean_order",
        "Merge models layer by layer, each on what the merged layers below make of the models' data (RegMean++).",
    ),
    "transfer": Declared(
        "mergekit_px.learn.transfer",
        "Train a model while another hands it knowledge (MergeNet, arXiv 2404.13322). Experimental.",
    ),
    "acmap map": Declared(
        "mergekit_px.learn.acmap",
        "Add a task's class prototypes to the state, and move those of earlier tasks to the newest merged adapter.",
    ),
    "acmap classify": Declared(
        "mergekit_px.learn.acmap",
        "Classify examples by the nearest prototype: the largest cosine with f(x; A_t), over all classes so far.",
    ),
}
