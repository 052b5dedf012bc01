"""Measures of singular spectra: energy, ranks, noise edges, interference between sources, alignment with a merge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_px.kernels.orthonormal import squared_norm

ROUNDING_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Largest relative error of rounding to a storage dtype."""

_BLOCK = 1 << 18
"""Elements that are looked at together: a copy of the whole would be one matrix more in memory."""

_ROUNDING_SPREAD = 0.57
"""Standard deviation of the difference of two rounded weights, in units of std(weights) * rounding unit."""


def null_floor(dtype: torch.dtype) -> float:
    """The relative singular value under which a component is rounding error of the decomposition itself."""
    return 16 * torch.finfo(dtype).eps


def storage_dtype(weights: Tensor, change: Tensor | None = None) -> torch.dtype:
    """The narrowest of bfloat16, float16 and float32 that holds (99 % of) these values exactly.

    The values themselves tell how they were stored, also after a conversion to the accumulation dtype.

    Args:
        weights: of any shape.
        change: added to the weights first.
    """
    parts = weights.reshape(-1).split(_BLOCK)
    changes = [0.0] * len(parts) if change is None else change.reshape(-1).split(_BLOCK)
    for dtype in (torch.bfloat16, torch.float16):
        exact = 0
        for part, added in zip(parts, changes, strict=True):
            values = part + added
            exact += int((values.to(dtype) == values).sum())
        if exact and exact >= 0.99 * weights.numel():
            return dtype
    return torch.float32


def rounding_noise_edge(base: Tensor, dtype: torch.dtype | None = None) -> float:
    """Largest singular value that rounding alone gives a delta (source minus base).

    ``0.57 std(base) u (sqrt m + sqrt n)`` for an (m, n) matrix whose weights were rounded to a dtype with unit
    roundoff u.

    Args:
        base: the base's matrix, (m, n), in any dtype.
        dtype: the dtype it was stored in; found from the values if left out.
    """
    if base.numel() < 2:
        return 0.0
    unit = ROUNDING_UNIT[dtype or storage_dtype(base)]
    rows, columns = base.shape
    spread = _standard_deviation(base)
    return _ROUNDING_SPREAD * spread * unit * (math.sqrt(rows) + math.sqrt(columns))


def _standard_deviation(values: Tensor) -> float:
    parts = values.reshape(-1).split(_BLOCK)
    mean = math.fsum(float(part.sum(dtype=torch.float64)) for part in parts) / values.numel()
    return math.sqrt(math.fsum(float((part.double() - mean).square_().sum()) for part in parts) / values.numel())


def noise_onset(values: Tensor, total_energy: float, shape: tuple[int, int]) -> int:
    """How many leading components stand above noise of the energy that they leave over.

    Component j + 1 is told from white noise only if it exceeds ``tau (sqrt m + sqrt n)`` (the Marchenko-Pastur edge,
    with a margin for finite size), where tau^2 spreads the energy left by the first j over the (m, n) matrix.

    Args:
        values: (k,) leading singular values, descending.
        total_energy: squared Frobenius norm of the whole matrix.
        shape: (m, n).
    """
    rows, columns = shape
    k = len(values)
    energy = values.double().square().cpu()
    left = (total_energy - (energy.cumsum(0) - energy)).clamp_min(0.0)
    index = torch.arange(k, dtype=torch.float64)
    free = ((rows - index) * (columns - index)).clamp_min(1.0)
    margin = 1 + 2 * min(rows, columns) ** (-2 / 3)
    edge = margin * (left / free).sqrt() * (math.sqrt(rows) + math.sqrt(columns))
    below = (energy.sqrt() <= edge).nonzero()
    return int(below[0]) if len(below) else k


def energy_kept(values: Tensor, count: int) -> float:
    """Share of the squared singular values held by the first ``count``; 1 for a zero spectrum."""
    energy = values.double().square()
    total = float(energy.sum())
    return float(energy[:count].sum()) / total if total > 0 else 1.0


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero spectrum."""
    total = float(values.double().sum())
    if total <= 0:
        return 0.0
    share = values.double() / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 for a zero spectrum."""
    energy = values.double().square()
    largest = float(energy.max()) if len(energy) else 0.0
    return float(energy.sum()) / largest if largest > 0 else 0.0


def interference(left: Tensor, values: Tensor, right: Tensor) -> float:
    """Singular task interference of stacked components, ``|| (U'U - I) diag(s) (V'V - I) ||_1`` (entrywise sum).

    Zero where the sources' singular vectors are orthogonal to one another (arXiv:2412.00081).

    Args:
        left: (m, k) left singular vectors of all sources side by side.
        values: (k,) singular values.
        right: (n, k) right singular vectors.
    """
    identity = torch.eye(left.shape[1], dtype=torch.float64, device=left.device)
    overlap_left = left.double().T @ left.double() - identity
    overlap_right = right.double().T @ right.double() - identity
    return float((overlap_left @ (values.double()[:, None] * overlap_right)).abs().sum())


def alignment(delta: Tensor, merged_left: Tensor) -> float:
    """Subspace alignment ratio ``||U U' D||_F / ||D||_F`` of a source's delta with a merge (arXiv:2502.04959).

    Args:
        delta: (m, n) delta of one source.
        merged_left: (m, k) leading left singular vectors of the merged delta, see :func:`alignment_rank`.

    Returns:
        A number from 0 to 1; 1 for a zero delta.
    """
    total = squared_norm(delta)
    return math.sqrt(min(1.0, squared_norm(merged_left.T @ delta) / total)) if total > 0 else 1.0


def alignment_rank(values: Tensor, error: float = 0.05) -> int:
    """The fewest leading components whose remainder is at most ``error`` of the whole, in Frobenius norm."""
    energy = values.double().square()
    total = float(energy.sum())
    if total <= 0:
        return 0
    left = (total - energy.cumsum(0)).clamp_min(0.0) / total
    return min(int((left.sqrt() > error).sum()) + 1, len(values))


def source_shares(values: Tensor, source: Tensor, count: int) -> list[float]:
    """Each source's share of the energy of a pool of components.

    Args:
        values: (k,) singular values in the pool.
        source: (k,) int64 source of each.
        count: number of sources.
    """
    energy = torch.zeros(count, dtype=torch.float64)
    energy.index_add_(0, source.cpu(), values.double().square().cpu())
    total = float(energy.sum())
    return [float(part) / total if total > 0 else 0.0 for part in energy]
