"""One source, unmerged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class PassthroughParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the weights."""


@merge_method(family="building block", space="any", access="elementwise", sources=(1, 1), scratch=1.0)
def passthrough(sources: Sequence[torch.Tensor], params: PassthroughParams) -> torch.Tensor:
    """Copy the source, or a multiple of it.

    ``scale * x``, element by element, whatever the shape. Useful for stacking layers and for scaling some of them.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    return weighted_sum(sources, [params.scale])
