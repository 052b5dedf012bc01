"""Arcee Fusion: take over only the elements that matter most."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.pruning import find_ranks

if TYPE_CHECKING:
    import torch


class ArceeFusionParams(Params):
    reach: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    """How many interquartile ranges above the median importance begins to count."""


def importance(delta: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """How much each element's change matters, in the dtype of the delta.

    The divergence of near distributions is a small difference of large terms, so that it is computed in float64.
    """
    import torch

    before = torch.log_softmax(base.to(torch.float64), dim=-1)
    after = torch.log_softmax(base.to(torch.float64) + delta, dim=-1)
    divergence = after.exp().mul_(after - before).sum(dim=-1, keepdim=True)
    return divergence.clamp_min_(0).to(delta.dtype) * delta.abs()


def _importance(operands: Operands) -> list[torch.Tensor]:
    if operands.base is None:
        raise UsageError("arcee_fusion needs the base itself, not only task vectors", hint="give a base")
    return [importance(operands.tensors[0], operands.base)]


def arcee_fusion_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, float]:
    """The least importance that counts."""
    from mergekit_px.kernels.selection import RankSearch

    if not extent.elements:
        return 0.0
    places = [int(share * (extent.elements - 1)) for share in (0.25, 0.5, 0.75)]
    quartiles = RankSearch.start([(0, extent.elements - place) for place in places], extent.elements)
    low, middle, high = (yield from find_ranks(quartiles, _importance)).values()
    reach: float = extent.params.reach
    return middle + reach * (high - low)


@merge_method(
    space="deltas",
    access="rows",
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    sources=(1, 1),
    statistics=arcee_fusion_statistics,
    scratch=16.0,
)
def arcee_fusion(
    deltas: Sequence[torch.Tensor], base: torch.Tensor, params: ArceeFusionParams, statistics: float
) -> torch.Tensor:
    """The base, with those elements of the source whose importance stands out.

    The importance of an element is ``|d| KL(softmax(x) || softmax(base))``, the divergence taken along its row ``x``
    (the vector along the last axis, so that a vector is one row). Elements of which it is at least
    ``median + reach * (Q3 - Q1)`` of the tensor's importances become those of the source, all others stay. Quartiles
    are elements: of n in ascending order those at ``floor(q (n - 1))``.

    Raises:
        UsageError: task vectors without the base that they belong to.
    """
    kept = importance(deltas[0], base) >= statistics
    return deltas[0] * kept
