"""CABS: sparse task vectors that keep out of each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Params, merge_method
from mergekit_px.methods.weighting import finite_weights

if TYPE_CHECKING:
    import torch


class CabsParams(Params):
    keep: Annotated[int, Field(ge=1)] = 64
    """Elements of each group that a source keeps (n); of a last group that is shorter, the same share, at least 1."""
    group: Annotated[int, Field(ge=1)] = 256
    """Neighbouring elements of a row that compete for their places (m)."""
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector."""


@merge_method(
    space="deltas",
    access="rows",
    paper="arXiv:2503.01874",
    scratch=10.0,
    overshoots=lambda _: "adds up what it keeps of each",
)
def cabs(deltas: Sequence[torch.Tensor], weights: Sequence[float], params: CabsParams) -> torch.Tensor:
    """Give each source the places that earlier ones left free (CABS, conflict-aware and balanced sparsification).

    Each row (the vectors along the last axis) is cut into groups of ``group`` elements. The sources, in their order,
    keep the ``keep`` largest of each group in magnitude, among the places that no earlier source holds; only where
    too few are left, also the largest of the others. The result is ``base + scale * sum_i w_i m_i d_i`` (Yang et al.,
    algorithms 1 and 2, n:m pruning). So order matters: the first source is served first. Of equal magnitudes the
    earlier place goes first. Of a last group that is shorter the same share is kept.

    Raises:
        UsageError: more are to be kept than a group has, or a weight is not finite.
    """
    import torch

    if params.keep > params.group:
        raise UsageError(f"a group of {params.group} elements cannot keep {params.keep}", hint="lower keep")
    first = deltas[0]
    if first.numel() == 0:
        return torch.zeros_like(first)
    width = first.shape[-1] if first.dim() else 1
    padded = -(-width // params.group) * params.group

    def groups(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.pad(tensor.reshape(-1, width), (0, padded - width))
        return rows.reshape(-1, params.group)

    real = groups(torch.ones(width, dtype=first.dtype, device=first.device).expand(first.numel() // width, width))
    # A row shorter than a group would else be kept whole, and all sources be summed.
    wanted = (real.sum(1, keepdim=True) * (params.keep / params.group)).round_().clamp_min_(1)
    first_of = (torch.arange(params.keep, device=first.device) < wanted).to(first.dtype)
    taken = torch.zeros_like(real)
    total = torch.zeros_like(first)
    for delta, weight in zip(deltas, finite_weights(weights), strict=True):
        # Free places come before taken ones, and those beyond the row last; then magnitudes decide.
        size = groups(delta.abs())
        order = size.argsort(dim=1, descending=True, stable=True)
        class_of = (taken + 2 * (1 - real)).gather(1, order)
        order = order.gather(1, class_of.argsort(dim=1, stable=True))[:, : params.keep]
        mask = torch.zeros_like(real).scatter_(1, order, first_of)
        taken = torch.maximum(taken, mask)
        kept = mask.reshape(-1, padded)[:, :width].reshape(first.shape)
        total.addcmul_(delta, kept, value=weight)
    return total.mul_(params.scale)
