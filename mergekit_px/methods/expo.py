"""ExPO: further in the direction that alignment took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class ExpoParams(Params):
    alpha: FiniteFloat = 0.3
    """How much further, as a share of the way from the base to the source; the authors found 0.3 and 0.5 good."""


@merge_method(space="deltas", access="elementwise", paper="arXiv:2404.16792", sources=(1, 1), scratch=2.0)
def expo(deltas: Sequence[torch.Tensor], params: ExpoParams) -> torch.Tensor:
    """Extrapolate from a base beyond one model that was aligned from it (ExPO, model extrapolation).

    ``base + (1 + alpha) d``: the source is the aligned model (DPO, RLHF), the base the model that its alignment began
    with (Zheng et al., section 2). Only small steps help, and only where alignment was short of its aim. Element by
    element, whatever the shape.
    """
    return deltas[0] * (1 + params.alpha)
