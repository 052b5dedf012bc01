"""Averaging by Fisher information."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Companions, Extent, Operands, Params, Sweep, merge_method
from mergekit_px.methods.weighting import shares_of_one

if TYPE_CHECKING:
    import torch

FISHER = Companions("Fisher information", ".fisher", lambda shape: shape)


class FisherParams(Params):
    floor: Annotated[float, Field(gt=0, le=1)] = 1e-12
    """Least Fisher information of an element: what no model's data say anything about is averaged."""
    normalize: bool = False
    """Divide each model's information by its L2 norm over the model, as the authors' code does: a model whose
    gradients are larger everywhere does not win everywhere. Then ``floor`` is of the divided information."""


def _squares(operands: Operands) -> torch.Tensor:
    """float64, shape (sources,): the sum of squares of each source's information; 0 where there is none."""
    import torch

    from mergekit_px.kernels.reduction import element_sum

    count = len(operands.weights)
    informations = operands.tensors[count:]
    if not len(informations):
        return torch.zeros(count, dtype=torch.float64)
    return torch.stack([element_sum(information.double().square()) for information in informations])


def fisher_statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, tuple[float, ...] | None]:
    """The norm of each source's information over the model; None where it is not asked for."""
    if not extent.params.normalize:
        return None
    norms = (yield _squares).sqrt().tolist()
    if not all(norms):
        raise UsageError("the Fisher information of a source is zero everywhere", hint="leave --normalize out")
    return tuple(norms)


def fisher_scope(params: FisherParams) -> Literal["tensor", "model"]:
    return "model" if params.normalize else "tensor"


@merge_method(
    family="statistics",
    space="weights",
    access="two_pass",
    paper="arXiv:2111.09832",
    companions=FISHER,
    statistics=fisher_statistics,
    scope=fisher_scope,
    scratch=4.0,
    weighing=shares_of_one,
)
def fisher(
    sources: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: FisherParams,
    statistics: tuple[float, ...] | None,
) -> torch.Tensor:
    """Fisher-weighted averaging: each parameter counts by how much the predictions depend on it.

    ``sum_i w_i F_i x_i / sum_i w_i F_i`` element by element, where ``F_i`` is the diagonal of the Fisher information
    of model i on its own data, at least ``floor`` (Matena and Raffel, equation 4). The sources are the models and
    then, in the same order, the files that ``pxmerge stats`` made of them.

    A weight multiplies its model's information: only ratios of the information matter, and models that are surer or
    have more data may be worth less of it. Tensors of every shape are treated alike; those of which no file has
    information are averaged by the weights.

    Raises:
        UsageError: the weights add up to zero, or one is negative or not finite.
    """
    from mergekit_px.kernels.reduction import weighted_sum

    shares = shares_of_one(weights)
    count = len(weights)
    if len(sources) == count:
        return weighted_sum(sources, shares)
    numerator = denominator = None
    norms = statistics or (1.0,) * count
    for source, information, weight, norm in zip(sources[:count], sources[count:], shares, norms, strict=True):
        if norm != 1.0:
            information = information / norm
        importance = information.clamp(min=params.floor).mul_(weight)
        share = importance * source
        numerator = share if numerator is None else numerator.add_(share)
        denominator = importance if denominator is None else denominator.add_(importance)
    assert numerator is not None and denominator is not None
    return numerator.div_(denominator)
