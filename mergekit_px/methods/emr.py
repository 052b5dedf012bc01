"""EMR's elected task vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class EmrParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the merged task vector (lambda)."""


@merge_method(space="deltas", access="elementwise", paper="arXiv:2405.17461", scratch=6.0)
def emr(deltas: Sequence[torch.Tensor], params: EmrParams) -> torch.Tensor:
    """Element-wise largest change in the direction that the sources agree on (EMR-Merging, elected vector).

    ``base + scale * s max_{i: sign(d_i) = s} |d_i|`` with ``s = sign(sum_i d_i)`` in each element (Huang et al.,
    section 3.2, elect). The masks and rescalers of single tasks, which the paper applies once the task is known, are
    not part of one checkpoint. Where the changes cancel, the base stays. Element by element, whatever the shape.
    """
    import torch

    from mergekit_px.kernels.signs import elect_signs

    count = len(deltas)
    signs = elect_signs(deltas, (1.0,) * count, (0.0,) * count, vote="sum", tie="zero")
    largest = torch.zeros_like(signs)
    for delta in deltas:
        torch.maximum(largest, delta * signs, out=largest)
    return largest.mul_(signs).mul_(params.scale)
