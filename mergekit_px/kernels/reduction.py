"""Sums over sources and sums over elements, in an order that nothing but the shape decides.

Sums over elements are float64 and are made row by row of a fixed length, so that the number of threads
cannot change them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROW = 4096


def weighted_sum(tensors: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """``sum_i coefficients[i] * tensors[i]`` in the order given, in fresh memory.

    Args:
        tensors: at least one; equal shapes, one floating-point dtype, which is that of the result.
        coefficients: one for each tensor. A tensor with coefficient 0 takes no part at all, and a lone one with
            coefficient 1 is copied bit for bit.
    """
    total: torch.Tensor | None = None
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient == 0:
            continue
        if total is not None:
            total.add_(tensor, alpha=coefficient)
        elif coefficient == 1:
            total = tensor.clone()
        else:
            total = torch.mul(tensor, coefficient)
    return torch.zeros_like(tensors[0]) if total is None else total


def element_sum(values: torch.Tensor) -> torch.Tensor:
    """float64 sum of all elements, shape ()."""
    flat = values.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = flat[:whole].view(-1, _ROW).sum(dim=1, dtype=torch.float64)
    return rows.sum() + flat[whole:].sum(dtype=torch.float64)


def absolute_sum(values: torch.Tensor) -> torch.Tensor:
    """float64 sum of magnitudes (the L1 norm), shape ()."""
    return element_sum(values.abs())


def gram(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 dot products of all pairs of flattened tensors, shape (k, k), symmetric.

    Products of float32 values are exact in float64.
    """
    doubles = [tensor.to(torch.float64) for tensor in tensors]
    result = torch.empty(len(doubles), len(doubles), dtype=torch.float64, device=tensors[0].device)
    for row, left in enumerate(doubles):
        for column, right in enumerate(doubles[: row + 1]):
            result[row, column] = result[column, row] = element_sum(left * right)
    return result
