"""Sign election and the disjoint mean of TIES (arXiv:2306.01708, section 3), on sources taken one at a time.

Everything is arithmetic on floats: on a CPU boolean masks cost several times as much as the sums they guard.
A *cut* is the largest magnitude that is trimmed away; inf trims everything, 0 nothing. NaN passes through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mergekit_px.kernels.reduction import integer_ratio

if TYPE_CHECKING:
    import torch

Vote = Literal["sum", "count"]
Tie = Literal["zero", "positive"]


def trim(values: torch.Tensor, cut: float) -> torch.Tensor:
    """Zero where ``|value| <= cut``, in fresh memory."""
    return values.hardshrink(_round_down(cut, values.dtype))


def elect_signs(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], cuts: Sequence[float], *, vote: Vote, tie: Tie
) -> torch.Tensor:
    """The sign of each element that the sources agree on: -1, 0 or 1, in the dtype and shape of the tensors.

    Differences of bfloat16 numbers are small multiples of one unit, so that votes cancel often. With coefficients
    that are ratios of small integers the sums are exact then, and a tie is a tie whatever the order of the sources.

    Args:
        tensors: the sources, equal in shape and dtype.
        coefficients: what each source is multiplied with before the vote.
        cuts: what is trimmed from each source before the vote.
        vote: ``sum``: the sign of the sum; ``count``: each nonzero element has one vote.
        tie: what wins where the votes cancel: neither sign, or the positive one.
    """
    if vote == "count":
        coefficients = [math.copysign(1.0, value) if value else 0.0 for value in coefficients]
    elif len({abs(value) for value in coefficients}) == 1 and coefficients[0]:
        coefficients = [value / abs(coefficients[0]) for value in coefficients]
    factors, _ = integer_ratio(tuple(coefficients))
    total = tensors[0].new_zeros(tensors[0].shape)
    for tensor, factor, cut in zip(tensors, factors, cuts, strict=True):
        ballot = trim(tensor, cut)
        if vote == "count":
            ballot.sign_()
        # Not fused with the addition, so that opposite products cancel.
        total.add_(ballot if factor == 1 else ballot.mul_(factor))
    total.sign_()
    return total.add_(0.5).sign_() if tie == "positive" else total


def disjoint_sum(
    tensors: Sequence[torch.Tensor],
    signs: torch.Tensor,
    coefficients: Sequence[float],
    cuts: Sequence[float],
    *,
    orientations: Sequence[float],
    shares: Sequence[float] | None,
) -> torch.Tensor:
    """Sum, or mean, over the sources that have the elected sign.

    Source i takes part in an element where ``orientations[i] * tensors[i]`` has the sign in ``signs`` and its
    magnitude is above ``cuts[i]``.

    Args:
        tensors: the sources, equal in shape and dtype.
        signs: -1, 0 or 1, of the same shape and dtype.
        coefficients: what each source is multiplied with in the sum.
        cuts: what is trimmed from each source.
        orientations: 1, or -1 for a source whose opposite is compared with ``signs``, or 0 for one left out.
        shares: what each source that takes part adds to the divisor (a divisor of 0 counts as 1); None for no
            division.
    """
    scaled, unit = integer_ratio((*coefficients, *(shares or ())))
    factors, parts = scaled[: len(coefficients)], scaled[len(coefficients) :]
    total = signs.new_zeros(signs.shape)
    divisor = signs.new_zeros(signs.shape)
    for index, tensor in enumerate(tensors):
        if orientations[index] == 0:
            continue
        agreeing = tensor.mul(signs)
        if orientations[index] < 0:
            agreeing.neg_()
        _clear_up_to(agreeing, _round_down(cuts[index], tensor.dtype))
        total.add_(agreeing, alpha=orientations[index] * factors[index])
        if parts:
            divisor.add_(agreeing.sign_(), alpha=parts[index])
    if parts:
        total.div_(_replace_zero(divisor, parts, unit))
    elif unit != 1:
        total.div_(unit)
    return total.mul_(signs)


def _clear_up_to(values: torch.Tensor, cut: float) -> None:
    """Replace what is not above a cut by 0, in place."""
    if hasattr(values, "threshold_"):  # of a program that is recorded, for which torch need not be there
        values.threshold_(cut, 0.0)
        return
    import torch

    torch.threshold_(values, cut, 0.0)


def _replace_zero(divisor: torch.Tensor, parts: Sequence[float], value: float) -> torch.Tensor:
    """Replace 0 in place, in a sum of some of the parts."""
    if min(parts) > 0:
        return divisor.clamp_(min=min(parts))  # 0 is the divisor of 0 alone
    # Parts of both signs may cancel, but for their rounding.
    solid = divisor.abs().sub_(2.0**-18 * sum(map(abs, parts))).clamp_(min=0).sign_()
    return divisor.mul_(solid).add_(solid.neg_().add_(1.0), alpha=value)


def _round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of that dtype that is not above a nonnegative value."""
    if dtype.itemsize == 8:
        return value
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(narrow if float(narrow) <= value else np.nextafter(narrow, np.float32(0)))
