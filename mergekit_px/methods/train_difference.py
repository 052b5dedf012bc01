"""Train difference: add what a fine-tune has learned where the model does not have it yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch

_STRENGTH = 1.8
"""What makes up for the damping: twice the mean factor of a half, a little less (SuperMerger's constant)."""


class TrainDifferenceParams(Params):
    alpha: FiniteFloat = 1.0
    """How much is added."""


@merge_method(
    space="deltas",
    access="elementwise",
    paper="https://github.com/hako-mikan/sd-webui-supermerger",
    sources=(2, 2),
    scratch=6.0,
)
def train_difference(deltas: Sequence[torch.Tensor], params: TrainDifferenceParams) -> torch.Tensor:
    """A model with what another has learned beyond their base, damped where it is near it already (SuperMerger).

    ``A + 1.8 alpha (B - C) |A - B| / (|A - B| + |B - C|)`` in each element, whatever the shape; A is the first source,
    B the second, C the base. Where A has what B has learned, nothing is added.
    """
    import torch

    model, learned = deltas
    apart = (model - learned).abs_()
    total = apart + learned.abs()
    share = torch.where(total > 0, apart / torch.where(total > 0, total, 1.0), 0.0)
    return share.mul_(learned).mul_(_STRENGTH * params.alpha).add_(model)
