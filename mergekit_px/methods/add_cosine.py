"""Mix two models by how alike their columns are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import FiniteFloat

from mergekit_px.methods.declare import Params, merge_method

if TYPE_CHECKING:
    import torch


class AddCosineParams(Params):
    alpha: FiniteFloat = 0.5
    """Share of the second model where both point the same way; it grows as they differ."""
    similarity: Literal["columns", "combined"] = "columns"
    """The cosine of each column (cosine A), or its mean with that of the whole tensor (cosine B)."""


@merge_method(
    family="average",
    space="weights",
    access="tensor",
    paper="https://github.com/ljleb/sd-mecha",
    sources=(2, 2),
    scratch=6.0,
)
def add_cosine(sources: Sequence[torch.Tensor], params: AddCosineParams) -> torch.Tensor:
    """Take more of the second model where its columns point elsewhere (cosine-adaptive sum, cosine A and B).

    ``(1 - k) A + k B`` with ``k = 1 - clip(c - alpha, 0, 1)``, where c is the cosine of A and B along the first axis,
    one for each column (each input of a matrix, each place in a kernel), as in sd-mecha; SuperMerger's modes of this
    name also stretch c between the 1st and 99th percentile of the model. ``combined`` is the mean of c and of the
    cosine of the whole tensors. Where a column is zero its cosine is 0. A vector is one column; of scalars c is 1 or
    -1. Takes the two models whole, tensor by tensor.
    """
    import torch

    first, second = sources
    if first.dim() == 0:
        cosine = (first * second).sign()
    else:
        norms = torch.linalg.vector_norm(first, dim=0) * torch.linalg.vector_norm(second, dim=0)
        cosine = _ratio((first * second).sum(dim=0), norms)
    if params.similarity == "combined":
        from mergekit_px.kernels.reduction import gram

        dots = gram([first, second])
        cosine = (cosine + float(dots[0, 1]) / (math.sqrt(float(dots[0, 0] * dots[1, 1])) or 1.0)) / 2
    return torch.lerp(first, second, (1 - (cosine - params.alpha).clamp_(0, 1)).expand_as(first))


def _ratio(value: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(norm > 0, value / torch.where(norm > 0, norm, 1.0), 0.0)
