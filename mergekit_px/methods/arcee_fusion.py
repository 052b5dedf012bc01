"""Arcee Fusion: take over only the elements that matter most."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.pruning import find_ranks

if TYPE_CHECKING:
    import torch

_FLOOR = 1e-8
"""What mergekit adds to both probabilities; in float32 it decides the last bits of a divergence near zero."""


class ArceeFusionParams(Params):
    reach: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    """How many interquartile ranges above the median importance begins to count."""
    divergence: Literal["exact", "float32"] = "exact"
    """How the divergences are computed: in float64, or as mergekit does, whose roundings stand out where the models
    are near."""


def _divergence(model: torch.Tensor, base: torch.Tensor, kind: Literal["exact", "float32"]) -> torch.Tensor:
    """KL(softmax(model) || softmax(base)) of each row, shape (..., 1), not negative."""
    import torch

    if kind == "float32":
        after, before = torch.softmax(model, dim=-1), torch.softmax(base, dim=-1)
        terms = after * torch.log((after + _FLOOR) / (before + _FLOOR))
    else:  # of near distributions it is a small difference of large terms
        after, before = (torch.log_softmax(tensor.to(torch.float64), dim=-1) for tensor in (model, base))
        terms = after.exp().mul_(after - before)
    return terms.sum(dim=-1, keepdim=True).clamp_min_(0)


def importance(model: torch.Tensor, base: torch.Tensor, params: ArceeFusionParams) -> torch.Tensor:
    """How much each element's change matters, in the dtype of the model."""
    return (model - base).abs_().mul_(_divergence(model, base, params.divergence).to(model.dtype))


def arcee_fusion_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, float]:
    """The least importance that counts."""
    from mergekit_px.kernels.selection import RankSearch

    if not extent.elements:
        return 0.0

    def values(operands: Operands) -> list[torch.Tensor]:
        base, model = operands.tensors
        return [importance(model, base, operands.params)]

    places = [int(share * (extent.elements - 1)) for share in (0.25, 0.5, 0.75)]
    quartiles = RankSearch.start([(0, extent.elements - place) for place in places], extent.elements)
    low, middle, high = (yield from find_ranks(quartiles, values)).values()
    reach: float = extent.params.reach
    return middle + reach * (high - low)


@merge_method(
    space="weights",
    access="rows",
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    sources=(2, 2),
    statistics=arcee_fusion_statistics,
    scratch=16.0,
    presets={"mergekit": {"divergence": "float32"}},
)
def arcee_fusion(sources: Sequence[torch.Tensor], params: ArceeFusionParams, statistics: float) -> torch.Tensor:
    """A base, the first source, with those elements of a model, the second, whose importance stands out.

    The importance of an element is ``|x - base| KL(softmax(x) || softmax(base))``, the divergence taken along its row
    (the vector along the last axis, so that a vector is one row). Elements of which it is at least ``median + reach *
    (Q3 - Q1)`` of the tensor's importances become those of the model, all others stay. Quartiles are elements: of n in
    ascending order those at ``floor(q (n - 1))``. The ``mergekit`` variant computes divergences in float32.
    """
    import torch

    base, model = sources
    return torch.where(importance(model, base, params) >= statistics, model, base)
