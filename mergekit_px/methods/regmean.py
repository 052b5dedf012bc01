"""Regression mean: linear layers whose outputs are nearest to those of all models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import Companions, Params, merge_method
from mergekit_px.methods.weighting import shares_of_one

if TYPE_CHECKING:
    import torch

GRAM = Companions("Gram matrices", ".gram", lambda shape: (shape[-1], shape[-1]) if shape else ())


class RegMeanParams(Params):
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.9
    """What the Gram matrices' elements off the diagonal are multiplied by."""
    ridge: Annotated[float, Field(ge=1e-12, le=1e6)] = 1e-6
    """Pull towards the base, or the average without one, in shares of the mean of the diagonals: decides along inputs
    that never occur."""


@merge_method(
    family="statistics",
    space="weights",
    access="tensor",
    paper="arXiv:2212.09849",
    companions=GRAM,
    scratch=14.0,
    weighing=shares_of_one,
)
def regmean(
    sources: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: RegMeanParams,
    load_base: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Match each layer's outputs by least squares on the models' own inputs (RegMean).

    For the (m, n) weight of a linear layer, ``X = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1`` minimises
    ``sum_i w_i E|X x - W_i x|^2`` (Jin et al., equation 2, for weights that multiply from the left), where
    ``G_i = E x x'`` is the Gram matrix of the inputs in model i, off the diagonal multiplied by ``shrink``.
    A small ``ridge`` towards the average of the weights keeps the solution unique. With a base it is towards the
    base, which may be any model or step, such as another method's merge of the sources: with ``ridge`` r times the mean
    d of the diagonals ``X = (sum_i w_i W_i G_i + r d A) (sum_i w_i G_i + r d I)^-1`` (arXiv:2605.12843). Rules give
    ``ridge`` by tensor. The sources are the models and then, in the same order, the files that ``pxmerge stats`` made
    of them.

    All other tensors are averaged by the weights. Solved in float64; holds a few (n, n) matrices.

    Raises:
        UsageError: the weights add up to zero, or one is negative or not finite.
        NonFiniteError: a Gram matrix is not positive, or holds a NaN or an infinity.
    """
    import torch

    from mergekit_px.errors import NonFiniteError
    from mergekit_px.kernels.reduction import weighted_sum

    count = len(weights)
    shares = shares_of_one(weights)
    first = sources[0]
    if len(sources) == count:
        return weighted_sum(sources, shares)
    average = sum((source.double() * share for source, share in zip(sources, shares, strict=False)), 0 * first.double())
    anchor = average if load_base is None else torch.zeros_like(average)  # the sources are differences to the base
    metric = average.new_zeros((average.shape[-1], average.shape[-1]))
    target = torch.zeros_like(average)
    for index, share in enumerate(shares):
        gram = _shrunk(sources[count + index].double(), params.shrink).mul_(share)
        metric += gram
        target.addmm_(sources[index].double() - anchor, gram)
    size = float(metric.diagonal().mean())
    metric.diagonal().add_(params.ridge * size if size > 0 else 1.0)
    factor, failed = torch.linalg.cholesky_ex(metric)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise NonFiniteError("the Gram matrices are not those of inputs: their sum is not positive")
    # The difference to the anchor is solved for: equal models give exactly themselves.
    return anchor.clone().add_(torch.cholesky_solve(target.T, factor).T).to(first.dtype)


def _shrunk(gram: torch.Tensor, shrink: float) -> torch.Tensor:
    diagonal = gram.diagonal().clone()
    gram = gram * shrink
    gram.diagonal().copy_(diagonal)
    return gram
