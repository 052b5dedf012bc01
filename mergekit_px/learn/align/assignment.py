"""The linear assignment problem: which unit stands for which."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_px.errors import UsageError

TIE = 1e-10
"""Gains below this share of the products are rounding errors."""


def require_solver() -> None:
    """Raise ``UsageError`` where scipy, which solves assignment problems, is not installed."""
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "permutations are found with scipy, which is not installed", hint='run: pip install "pxmerge[align]"'
        )


def best_assignment(products: Tensor) -> Tensor:
    """The permutation ``p`` that maximises ``sum_i products[i, p[i]]``; int64, for a square matrix (n, n)."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(products.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def total(products: Tensor, order: Tensor) -> float:
    """``sum_i products[i, order[i]]``."""
    return float(products.gather(1, order[:, None]).sum())


def is_better(products: Tensor, found: Tensor, now: Tensor) -> bool:
    """Whether an order gains more than rounding errors over another; of equals, the one that is there stays."""
    scale = float(products.abs().amax(dim=1).sum())
    return total(products, found) - total(products, now) > TIE * scale
