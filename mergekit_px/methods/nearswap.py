"""NearSwap: take over small changes, cut off large ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class NearswapParams(Params):
    t: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """The most that an element of the base is changed."""


@merge_method(
    space="deltas",
    access="elementwise",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    sources=(1, 1),
    scratch=1.0,
)
def nearswap(deltas: Sequence[torch.Tensor], params: NearswapParams) -> torch.Tensor:
    """Move the base towards the source by at most ``t`` in each element (NearSwap).

    ``base + w d`` with ``w = min(t / |d|, 1)``, which is ``base + clamp(d, -t, t)``: elements that are near become
    those of the source, others are nudged. Element by element, whatever the shape.
    """
    return deltas[0].clamp(-params.t, params.t)
