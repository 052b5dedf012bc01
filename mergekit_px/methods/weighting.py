"""Checks of the sources' weights that several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_px.errors import UsageError


def finite_weights(weights: Sequence[float]) -> Sequence[float]:
    """The weights themselves.

    Raises:
        UsageError: one of them is a NaN or an infinity.
    """
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"a weight is {weight}", hint="weights are finite numbers")
    return weights


def total_weight(weights: Sequence[float], hint: str = "set normalize to false, or choose other weights") -> float:
    """The sum of the weights, for a division by it; ``hint`` says what else the method can do.

    Raises:
        UsageError: they cancel (or are all zero), or one of them is not finite.
    """
    total = math.fsum(finite_weights(weights))
    if abs(total) <= 1e-6 * math.fsum(map(abs, weights)):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise UsageError(
            f"the weights {shown} add up to zero, so they cannot be divided by their sum",
            hint=hint,
        )
    return total


def shares_of_one(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, for a mean that has no place for negative ones.

    Raises:
        UsageError: one of them is negative or not finite, or all are zero.
    """
    total = total_weight(weights, hint="choose other weights")
    if min(weights) < 0:
        raise UsageError("a weight is negative", hint="this method takes weights from 0 upwards")
    return [weight / total for weight in weights]
