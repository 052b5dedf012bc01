"""Localize-and-Stitch: the largest changes of each task, stitched into one model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Extent, Params, Sweep, merge_method
from mergekit_px.methods.pruning import SharePerSource, kept_count, magnitude_cuts, per_source

if TYPE_CHECKING:
    import torch


class LocalizeAndStitchParams(Params):
    density: SharePerSource = 0.05
    """Share of each source's elements that is stitched in, the largest in magnitude."""
    trim_scope: Literal["model", "tensor"] = "model"
    """Where the largest are sought: in all merged tensors of a source together, as in the paper, or in each alone."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


def localize_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...]]:
    """For each source the largest magnitude that is left out."""
    densities = per_source(extent.params.density, extent.sources)
    return (yield from magnitude_cuts(extent, [kept_count(density, extent.elements) for density in densities]))


def localize_scope(params: Any) -> Literal["tensor", "model"]:
    scope: Literal["tensor", "model"] = params.trim_scope
    return scope


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2408.13656",
    statistics=localize_statistics,
    scope=localize_scope,
    scratch=6.0,
)
def localize_and_stitch(
    deltas: Sequence[torch.Tensor], params: LocalizeAndStitchParams, statistics: Sequence[float]
) -> torch.Tensor:
    """Keep each source's largest changes, and average where they overlap (Localize-and-Stitch, data-free).

    ``base + scale * sum_{i in A} d_i / |A|``, where A are the sources of whose elements this is one of the
    ``int(density * n)`` largest (He et al., section 3, with the masks of the dataless version; the learned masks need
    data). The threshold is exact, and all elements that tie with the last stay. Element by element, whatever the shape.

    Raises:
        UsageError: densities are given for another number of sources.
    """
    import torch

    from mergekit_px.kernels.signs import trim

    total = torch.zeros_like(deltas[0])
    count = torch.zeros_like(deltas[0])
    for delta, cut in zip(deltas, statistics, strict=True):
        kept = trim(delta, cut)
        total += kept
        count += kept.sign_().abs_()
    return total.div_(count.clamp_(min=1)).mul_(params.scale)
