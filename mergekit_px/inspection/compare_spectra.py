"""How the differences of models look as matrices: their effective ranks, and how far they share a subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.reader import TensorReader

if TYPE_CHECKING:
    import torch


def spectra(readers: Sequence[TensorReader], stored: Sequence[StoredTensor]) -> dict[str, Any]:
    """``effective_ranks`` of the differences to the first model, and their ``alignments`` with one another.

    ``alignments[i][j]`` is the subspace alignment ratio of difference i with difference j,
    ``|| U_j U_j' D_i || / || D_i ||`` with the fewest left vectors of D_j that leave at most 5 % of its norm
    (arXiv:2502.04959). A tensor of more than two axes is a matrix of flattened rows. Both are None where the tensor
    is no matrix, and single numbers where a difference is zero or not finite. One difference is held at a time.

    Raises:
        InputError: a tensor that cannot be read.
    """
    from mergekit_px.kernels.spectra import alignment, alignment_rank, effective_rank
    from mergekit_px.kernels.svd import truncated_svd

    shape = stored[0].shape
    nothing = {"effective_ranks": None, "alignments": None}
    if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2 or not all(one.dtype.arithmetic for one in stored):
        return nothing
    models = range(1, len(stored))
    ranks: list[float | None] = []
    bases: list[torch.Tensor | None] = []
    for model in models:
        delta = _delta(readers, stored, model)
        if delta is None:
            ranks.append(None)
            bases.append(None)
            continue
        parts = truncated_svd(delta, label=stored[0].name)
        ranks.append(effective_rank(parts.s))
        bases.append(parts.u[:, : alignment_rank(parts.s)].clone())
    if len(bases) == 1:
        return {"effective_ranks": ranks, "alignments": [[None if bases[0] is None else 1.0]]}
    alignments: list[list[float | None]] = []
    for model in models:
        delta = _delta(readers, stored, model)
        alignments.append([None if delta is None or basis is None else alignment(delta, basis) for basis in bases])
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


def _delta(readers: Sequence[TensorReader], stored: Sequence[StoredTensor], model: int) -> torch.Tensor | None:
    """The difference of a model to the first, (m, n); None where it is zero or not finite."""
    wide = stored[0].dtype.bits > 32
    values = [_read(readers[place], stored[place]) for place in (model, 0)]
    delta = values[0].double().sub_(values[1]) if wide else values[0].float().sub_(values[1].float())
    if not bool(delta.isfinite().all()) or not bool(delta.any()):
        return None
    return delta


def _read(reader: TensorReader, stored: StoredTensor) -> torch.Tensor:
    import torch

    values = torch.empty(stored.shape, dtype=stored.dtype.torch)
    reader.read_into(stored, 0, values.reshape(-1).view(torch.uint8).numpy().data)
    return values.reshape(stored.shape[0], -1)
