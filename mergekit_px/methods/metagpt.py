"""MetaGPT: task arithmetic whose weights follow from the sizes of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method

if TYPE_CHECKING:
    import torch


class MetagptParams(Params):
    norm_scope: Literal["model", "tensor"] = "model"
    """Whether norms are those of all merged tensors together, as in the paper, or of each alone."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


def squared_norms(operands: Operands) -> torch.Tensor:
    """A sweep: the sums of squares of the sources, float64, shape (k)."""
    import torch

    from mergekit_px.kernels.reduction import element_sum

    return torch.stack([element_sum(tensor.to(torch.float64).square()) for tensor in operands.tensors])


def metagpt_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """The weights of the sources; those of zero task vectors are 0."""
    squares = (yield squared_norms).tolist()
    total = math.fsum(squares)
    return tuple(square / total if total else 0.0 for square in squares)


def metagpt_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.norm_scope
    return scope


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2406.11385",
    statistics=metagpt_statistics,
    scope=metagpt_scope,
    scratch=4.0,
)
def metagpt(deltas: Sequence[torch.Tensor], params: MetagptParams, statistics: Sequence[float]) -> torch.Tensor:
    """Task arithmetic weighted by the squared norms of the task vectors (MetaGPT).

    ``base + scale * sum_i w_i d_i`` with ``w_i = ||d_i||^2 / sum_j ||d_j||^2``: for orthogonal task vectors the weights
    that lose least on average over the tasks (Zhou et al., section 3). Element by element, whatever the shape.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(deltas, [params.scale * weight for weight in statistics])
