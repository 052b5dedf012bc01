"""ResMerge: the tails of task vectors carry the merge, their heads only where they agree."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.matrices import Case, Count, MatrixMerge, SpectralParams, component_count, matrix_method

if TYPE_CHECKING:
    import torch


class ResMergeParams(SpectralParams):
    head: Count = 1
    """Leading components of each source that are its head, a number or a percentage of the rank."""
    budget: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """Norm of the heads' part where they agree fully, as a share of that of the tails' part."""
    least_shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Exponent of the tails' coherence where they agree fully."""
    most_shrinkage: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of the tails' coherence where they oppose one another."""


@matrix_method(paper="arXiv:2606.02252", scratch=8.0)
def res_merge(case: Case, params: ResMergeParams) -> MatrixMerge:
    """Mean direction of the sources' tails, with heads added as far as they agree (ResMerge, residual merging).

    For a matrix, each ``w_t D_t`` is a head ``H_t`` of its leading components and a tail ``R_t``. With unit tails
    ``q_t``, ``c = ||sum_t q_t|| / T`` and s the mean cosine of two tails, the merged tail has the direction of
    ``sum_t q_t`` and the norm ``c^b mean_t ||R_t||``, where b falls from 1 to 0.7 as ``(s + c + 2) / 4`` rises from 0
    to 1; where c is no more than random directions have, ``1 / sqrt(T)``, it is the mean of the tails. The mean head
    is added with a norm of ``budget`` times its agreement, the mean of the positive parts of the heads' cosines, times
    the norm of the merged tail (Sun et al., as in their code, which treats attention and feed-forward layers so).
    Meant for fine-tunes by reinforcement learning, whose leading directions conflict. All other tensors, and
    embeddings unless wanted, get the mean of the deltas. ``scale`` multiplies everything.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank, cosine
    from mergekit_px.kernels.orthonormal import squared_norm

    heads: list[LowRank] = []
    mean: torch.Tensor | None = None
    length, unit = 0.0, 0
    for _ in range(case.count):
        tail = (yield).pop().clone()
        if mean is None:
            mean, directions = torch.zeros_like(tail), torch.zeros_like(tail)
        whole = math.sqrt(squared_norm(tail))
        parts = case.svd(tail, component_count(params.head, case.rank))
        heads.append(LowRank.from_svd(parts))
        tail -= heads[-1].dense()
        norm = math.sqrt(squared_norm(tail))
        mean.add_(tail, alpha=1 / case.count)
        if norm > 1e-6 * whole:  # below it is what rounding leaves of a source that is all head
            directions.add_(tail, alpha=1 / norm)
            length += norm / case.count
            unit += 1
        del tail, parts
    assert mean is not None
    merged = _tail(mean, directions, length, unit, case.count, params)
    known = [head for head in heads if head.rank]
    pairs = [max(0.0, cosine(one, other)) for one, other in combinations(known, 2)]
    agreement = math.fsum(pairs) / len(pairs) if pairs else float(bool(known))
    head = torch.zeros_like(merged)
    for one in known:
        head += one.dense()
    size = math.sqrt(squared_norm(head))
    if size > 0:
        merged.add_(head, alpha=params.budget * agreement * math.sqrt(squared_norm(merged)) / size)
    return merged


def _tail(
    mean: torch.Tensor, directions: torch.Tensor, length: float, unit: int, count: int, params: ResMergeParams
) -> torch.Tensor:
    """The merged tail, from the mean of the tails, the sum of ``unit`` of unit norm, and the mean of their norms."""
    from mergekit_px.kernels.orthonormal import squared_norm

    square = squared_norm(directions)
    coherence = min(1.0, math.sqrt(square) / count)
    if square == 0 or (count > 1 and coherence <= 1 / math.sqrt(count)):
        return mean
    similarity = (square - unit) / (count * (count - 1)) if count > 1 else 1.0
    agreement = min(1.0, max(0.0, (similarity + coherence + 2) / 4))
    exponent = params.most_shrinkage - (params.most_shrinkage - params.least_shrinkage) * agreement
    return directions.mul(coherence**exponent * length / math.sqrt(square))
