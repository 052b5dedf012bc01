"""RAM: average what several task vectors change, keep what one changes alone."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from mergekit_px.methods.declare import Extent, Operands, Params, Sweep, merge_method

if TYPE_CHECKING:
    import torch


class RamParams(Params):
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """Magnitude above which an element counts as changed."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


class RamPlusParams(RamParams):
    growth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """How much a source's own elements grow for each element that it shares, per element of its own (r)."""
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """The ratio of shared to own elements that counts at most (alpha)."""
    overlap_scope: Literal["model", "tensor"] = "model"
    """Where the elements are counted: in all merged tensors together, as in the paper, or in each alone."""


def _changed(deltas: Sequence[torch.Tensor], threshold: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each task vector where it changes something, and how many do, as 0, 1, 2 ... in the deltas' dtype."""
    import torch

    changed = [(delta.abs() > threshold).to(delta.dtype) for delta in deltas]
    count = torch.zeros_like(deltas[0])
    for mask in changed:
        count += mask
    return changed, count


def merge_regions(deltas: Sequence[torch.Tensor], params: RamParams, factors: Sequence[float]) -> torch.Tensor:
    """The mean over the sources that change an element, times the source's factor where there is only one."""
    import torch

    changed, count = _changed(deltas, params.threshold)
    alone = (count == 1).to(count.dtype)
    total = torch.zeros_like(deltas[0])
    for delta, mask, factor in zip(deltas, changed, factors, strict=True):
        part = mask.mul_(delta)
        total += part
        if factor != 1:
            total.addcmul_(part, alone, value=factor - 1)
    total /= count.clamp_(min=1)
    return total if params.scale == 1 else total.mul_(params.scale)


@merge_method(space="deltas", access="elementwise", paper="arXiv:2601.13572", sources=(1, None), scratch=12.0)
def ram(deltas: Sequence[torch.Tensor], params: RamParams) -> torch.Tensor:
    """Average the elements that several sources change, keep whole those that only one does (Reinforced Agent Merging).

    ``base + scale * sum_{i in A} d_i / |A|``, where A are the sources with ``|d_i| > threshold`` in that element (Yuan
    et al., section 4; task vectors of reinforcement learning are sparse, and a mean over all would shrink them).
    Element by element, whatever the shape.
    """
    return merge_regions(deltas, params, (1.0,) * len(deltas))


def ram_plus_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """For each source the factor of what it changes alone."""
    threshold = extent.params.threshold

    def overlap(operands: Operands) -> torch.Tensor:
        import torch

        changed, count = _changed(operands.tensors, threshold)
        counts = [torch.stack([(mask * (count == 1)).sum(), (mask * (count > 1)).sum()]) for mask in changed]
        return torch.stack(counts).to(torch.int64)

    growth, clip = extent.params.growth, extent.params.clip
    ratios = [shared / alone if alone else 0.0 for alone, shared in (yield overlap).tolist()]
    return tuple(1 + growth * min(ratio, clip) for ratio in ratios)


def ram_plus_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.overlap_scope
    return scope


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2601.13572",
    sources=(1, None),
    statistics=ram_plus_statistics,
    scope=ram_plus_scope,
    scratch=12.0,
    presets={"mergekit": {"overlap_scope": "tensor"}},
)
def ram_plus(deltas: Sequence[torch.Tensor], params: RamPlusParams, statistics: Sequence[float]) -> torch.Tensor:
    """RAM with the elements that only one source changes strengthened, the more the others dilute that source (RAM+).

    As ``ram``; where source i alone changes an element, its value is multiplied with ``1 + growth * min(rho_i, clip)``.
    ``rho_i`` is the number of elements that it changes together with others, divided by the number that it changes
    alone (Yuan et al., section 4), in the whole model; the ``mergekit`` variant counts in each tensor alone.
    Element by element, whatever the shape.
    """
    return merge_regions(deltas, params, statistics)
