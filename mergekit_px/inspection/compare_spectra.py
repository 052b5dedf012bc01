"""How the differences of models look as matrices: their effective ranks, and how far they share a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.inspection.values import Values
from mergekit_px.methods.matrices import SpectralParams, cut_into_matrices

if TYPE_CHECKING:
    import torch


def spectra(found: Sequence[Values]) -> dict[str, Any]:
    """``effective_ranks`` of the differences to the first model, and their ``alignments`` with one another.

    ``alignments[i][j]`` is the subspace alignment ratio of difference i with difference j,
    ``|| U_j U_j' D_i || / || D_i ||`` with the fewest left vectors of D_j that leave at most 5 % of its norm
    (arXiv:2502.04959). A stack of experts counts by the means over its matrices, another tensor of more than two axes
    as a matrix of flattened rows. Both are None where the tensor is no matrix, and single numbers where a difference
    is zero or not finite. One difference is held at a time.

    Raises:
        InputError: a tensor that cannot be read.
    """
    from mergekit_px.kernels.spectra import alignment, alignment_rank, effective_rank
    from mergekit_px.kernels.svd import truncated_svd

    views = cut_into_matrices(found[0].shape, found[0].name, SpectralParams(embeddings="spectral"))
    if views is None or not all(one.dtype.arithmetic for one in found):
        return {"effective_ranks": None, "alignments": None}
    models = range(1, len(found))
    ranks: list[float | None] = []
    bases: list[list[torch.Tensor | None]] = []
    for model in models:
        matrices = _matrices(found, model, views)
        parts = [None if one is None else truncated_svd(one, label=found[0].name) for one in matrices]
        ranks.append(_mean([None if one is None else effective_rank(one.s) for one in parts]))
        bases.append([None if one is None else one.u[:, : alignment_rank(one.s)].clone() for one in parts])
    if len(bases) == 1:
        return {"effective_ranks": ranks, "alignments": [[None if ranks[0] is None else 1.0]]}
    alignments: list[list[float | None]] = []
    for model in models:
        matrices = _matrices(found, model, views)
        alignments.append(
            [
                _mean(
                    [
                        None if matrix is None or basis is None else alignment(matrix, basis)
                        for matrix, basis in zip(matrices, other, strict=True)
                    ]
                )
                for other in bases
            ]
        )
    return {"effective_ranks": ranks, "alignments": alignments}


def mean_spectra(rows: Sequence[Mapping[str, Any]], models: int) -> dict[str, Any]:
    """The means over all matrices in which the numbers have a meaning."""
    matrices = [row for row in rows if row["effective_ranks"] is not None]
    return {
        "effective_ranks": [_mean([row["effective_ranks"][i] for row in matrices]) for i in range(models)],
        "alignments": [
            [_mean([row["alignments"][i][j] for row in matrices]) for j in range(models)] for i in range(models)
        ],
    }


def mean_alignment(alignments: Sequence[Sequence[float | None]] | None) -> float | None:
    """One number for all pairs of different models; None where there is none."""
    if alignments is None:
        return None
    return _mean([value for i, row in enumerate(alignments) for j, value in enumerate(row) if i != j])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _matrices(
    found: Sequence[Values], model: int, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> list[torch.Tensor | None]:
    """The difference of a model to the first as matrices (m, n); None for those that are zero or not finite."""
    values = [found[place].read(0, math.prod(found[0].shape)).reshape(found[0].shape) for place in (model, 0)]
    wide = any(each.dtype.bits > 32 for each in found)
    delta = values[0].double().sub_(values[1]) if wide else values[0].float().sub_(values[1].float())
    matrices = [view(delta) for view in views]
    return [one if bool(one.isfinite().all()) and bool(one.any()) else None for one in matrices]
