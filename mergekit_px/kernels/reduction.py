"""Sums over sources and sums over elements, in an order that nothing but the shape decides.

Sums over elements are float64 and are made row by row of a fixed length, so that the number of threads
cannot change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

ROW = 4096
"""Elements of a row of sums over elements."""

_LARGEST_INTEGER = 2**12


@lru_cache(maxsize=1024)
def integer_ratio(coefficients: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """Integers and a common divisor that stand for the coefficients: 0.5, 0.3, 0.2 are 5, 3, 2 divided by 10.

    Small integer multiples of bfloat16 and float16 numbers are exact in float32, so that a sum of them is rounded
    in the division only. Coefficients that are not ratios of small integers come back as they are, divisor 1.
    """
    if not all(map(math.isfinite, coefficients)):
        return coefficients, 1.0
    fractions = [Fraction(value).limit_denominator(_LARGEST_INTEGER) for value in coefficients]
    divisor = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = tuple(float(fraction * divisor) for fraction in fractions)
    alike = all(math.isclose(f, value, rel_tol=1e-14) for f, value in zip(fractions, coefficients, strict=True))
    small = max(divisor, *map(abs, integers)) <= _LARGEST_INTEGER
    return (integers, float(divisor)) if alike and small else (coefficients, 1.0)


def weighted_sum(tensors: Iterable[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """``sum_i coefficients[i] * tensors[i]`` in the order given, in fresh memory.

    Args:
        tensors: at least one; equal shapes, one floating-point dtype, which is that of the result. Taken one at a
            time.
        coefficients: one for each tensor; see :func:`integer_ratio`. A tensor with coefficient 0 takes no
            part at all, and a lone one with coefficient 1 is copied bit for bit.
    """
    factors, divisor = integer_ratio(tuple(coefficients))
    total: torch.Tensor | None = None
    for tensor, factor in zip(tensors, factors, strict=True):
        if total is None:
            total = _multiple(tensor, factor)
        elif factor:
            total.add_(tensor, alpha=factor)
    if total is None:
        raise ValueError("a sum of no tensors has no shape")
    return total if divisor == 1 else total.div_(divisor)


def _multiple(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    if factor == 0:
        return tensor.new_zeros(tensor.shape)
    return tensor.clone() if factor == 1 else tensor.mul(factor)


def element_sum(values: torch.Tensor) -> torch.Tensor:
    """float64 sum of all elements, shape ()."""
    import torch

    flat = values.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = flat[:whole].view(-1, ROW).sum(dim=1, dtype=torch.float64)
    return rows.sum() + flat[whole:].sum(dtype=torch.float64)


def absolute_sum(values: torch.Tensor) -> torch.Tensor:
    """float64 sum of magnitudes (the L1 norm), shape ()."""
    return element_sum(values.abs())


def gram(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 dot products of all pairs of flattened tensors, shape (k, k), symmetric.

    Products of float32 values are exact in float64. On a CPU they are summed in the order of :func:`gram_of_rows`.
    """
    import torch

    flat = [tensor.reshape(-1) for tensor in tensors]
    pairs = list(pairs_of(len(flat)))
    if flat[0].device.type != "cpu":
        result = flat[0].new_empty(len(flat), len(flat), dtype=torch.float64)
        for row, column in pairs:
            result[row, column] = result[column, row] = torch.dot(flat[row].double(), flat[column].double())
        return result
    sums = torch.zeros(len(pairs), ROW, dtype=torch.float64)
    for begin in range(0, flat[0].numel(), ROW):
        doubles = [values[begin : begin + ROW].to(torch.float64) for values in flat]
        for total, (row, column) in zip(sums, pairs, strict=True):
            total[: len(doubles[row])].addcmul_(doubles[row], doubles[column])
    return torch.from_numpy(gram_of_rows(sums.numpy(), len(flat)))


def pairs_of(count: int) -> Iterator[tuple[int, int]]:
    """The places of a symmetric matrix that say everything, in order."""
    return ((row, column) for row in range(count) for column in range(row + 1))


def gram_of_rows(sums: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The Gram matrix, (k, k), of sums over rows of :data:`ROW` elements, (pairs, ROW), one row after another.

    The sums of a row are added half to half, so that the order is the same whoever made them.
    """
    import numpy as np

    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    result = np.empty((count, count))
    for total, (row, column) in zip(sums[:, 0], pairs_of(count), strict=True):
        result[row, column] = result[column, row] = total
    return result
