"""Model Stock: how far to go from the base to the mean, by the angle between the fine-tunes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.methods.declare import Extent, Params, Sweep, merge_method
from mergekit_px.methods.sphere import dots

if TYPE_CHECKING:
    import torch

_SINGULAR = 1e-6


class ModelStockParams(Params):
    along: Literal["tensor", "rows"] = "tensor"
    """What the angles are between: whole tensors, as in the paper, or each row (the vectors along the last axis)."""


def interpolation_ratio(gram: torch.Tensor) -> float:
    """The ratio t of the task vectors' Gram matrix, shape (k, k), float64; a zero vector has cosine 0 with all."""
    rows = gram.tolist()
    count = len(rows)
    cosines = []
    for i, j in itertools.combinations(range(count), 2):
        norms = math.sqrt(rows[i][i]) * math.sqrt(rows[j][j])
        cosines.append(rows[i][j] / norms if norms > 0 else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) > _SINGULAR else 0.0


def row_ratios(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ratio of each row by itself, shape (..., 1), in the deltas' dtype."""
    import torch

    count = len(deltas)
    doubles = [delta.to(torch.float64) for delta in deltas]
    lengths = [row.square().sum(dim=-1, keepdim=True).sqrt_() for row in doubles]
    pairs = list(itertools.combinations(range(count), 2))
    cosine = torch.zeros_like(lengths[0])
    for i, j in pairs:
        product = (doubles[i] * doubles[j]).sum(dim=-1, keepdim=True)
        norms = lengths[i] * lengths[j]
        cosine += torch.where(norms > 0, product / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    cosine /= len(pairs)
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() > _SINGULAR, count * cosine / denominator, 0.0).to(deltas[0].dtype)


def model_stock_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, float | None]:
    return None if extent.params.along == "rows" else interpolation_ratio((yield dots))


def model_stock_cut(params: Any) -> Literal["rows"] | None:
    return "rows" if params.along == "rows" else None


@merge_method(
    space="deltas",
    access="two_pass",
    paper="arXiv:2403.19522",
    sources=(2, None),
    statistics=model_stock_statistics,
    coarser=model_stock_cut,
    scratch=12.0,
)
def model_stock(deltas: Sequence[torch.Tensor], params: ModelStockParams, statistics: float | None) -> torch.Tensor:
    """Interpolate between base and average by the angle between the fine-tunes (Model Stock).

    ``base + t * mean_i d_i`` with ``t = n c / (1 + (n - 1) c)``, where ``c`` is the cosine between the task vectors
    of this tensor, the mean over all pairs if there are more than two (Jang et al., equations 2 and 3, which take
    each layer alone, as here). Orthogonal task vectors give the base, equal ones the fine-tune itself.

    Tensors of every shape are taken as one vector each, or with ``along: rows`` each row as one. Where
    ``1 + (n - 1) c`` vanishes, the base stays.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    if statistics is None:
        return weighted_sum(deltas, [1 / len(deltas)] * len(deltas)).mul_(row_ratios(deltas))
    return weighted_sum(deltas, [statistics / len(deltas)] * len(deltas))
