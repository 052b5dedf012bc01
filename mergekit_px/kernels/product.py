"""Products of large float32 matrices on the CPU by oneDNN, where torch has it.

torch multiplies float32 matrices with MKL, which leaves half of the vector unit idle on processors that are not
Intel's: on an AMD EPYC with AVX-512, 2048 x 2048 matrices take 0.17 s on one core with MKL and 0.08 s with oneDNN,
and a 4096 x 4096 matrix times 32 columns 0.020 s and 0.006 s. The sums are float32 in both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_FEWEST_FLOPS = 1 << 22
"""Below this the call costs more than it saves."""

_BLOCK = 512
"""Columns of a Gram matrix that are multiplied out together."""

_ROWS = 2048
"""Rows that are added up at a time."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of (m, k) and (k, n) matrices of one dtype; the result may be a transposed view."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or 2 * a.numel() * b.shape[1] < _FEWEST_FLOPS:
        return a @ b
    linear = _linear()
    if linear is None:
        return a @ b
    a, b = _dense(a), _dense(b)
    # The first operand has to be contiguous; of two products that give the same, that with the smaller copy is made.
    forward = 0 if a.is_contiguous() else a.numel()
    backward = 0 if b.T.is_contiguous() else b.numel()
    if forward <= backward:
        made: Tensor = linear(a.contiguous(), b.T, None, "none", [], "")
        return made
    made = linear(b.T.contiguous(), a, None, "none", [], "")
    return made.T


def fast_gram(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """``X'X`` with ``X = scale * matrix``, (m, n), in its own dtype; about half is multiplied out."""
    n = matrix.shape[1]
    total = matrix.new_zeros((n, n))
    for rows in matrix.split(_ROWS):
        columns = rows.T.contiguous()
        if scale != 1:
            columns = columns * scale
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            total[start:stop, :stop] += product(columns[start:stop], columns[:stop].T)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        total[:start, start:stop] = total[start:stop, :start].T
    return total


def _dense(matrix: Tensor) -> Tensor:
    # Rows with gaps between them take a path that is a hundred times slower.
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


@cache
def _linear() -> Any:
    """``linear(x, w, None, "none", [], "")`` is ``x @ w.T``; None where this torch or processor has no such thing."""
    try:
        found = torch.ops.mkldnn._linear_pointwise
        left, right = torch.eye(32), torch.arange(1024.0).reshape(32, 32)
        return found if torch.equal(found(left, right, None, "none", [], ""), right.T) else None
    except (AttributeError, RuntimeError):
        return None
