"""The coordinates in which adapters are merged: each turns the updates of one module into small or large matrices,
one for each adapter, and the merged matrix back into an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.low_rank import LowRank


@dataclass(frozen=True)
class Space:
    """The updates of one module in some coordinates.

    Attributes:
        coordinates: one matrix for each adapter.
        rebuild: the update, whole or factored, that a matrix in these coordinates stands for.
    """

    coordinates: Sequence[torch.Tensor]
    rebuild: Callable[[torch.Tensor], torch.Tensor | LowRank]


def dense_space(updates: Sequence[LowRank]) -> Space:
    """dW itself."""
    return Space([update.dense() for update in updates], lambda merged: merged)


def knots_space(updates: Sequence[LowRank]) -> Space:
    """KnOTS (arXiv 2410.19735, section 4): ``[dW_1 .. dW_T] = U diag(s) [V_1 .. V_T]^T``; adapter t is
    ``diag(s) V_t^T`` in the common basis U.

    The decomposition is that of a core as large as the ranks together; the (m, T n) matrix is never formed.
    Directions without weight in the rounding of the factors are left out.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank

    left, triangle = torch.linalg.qr(torch.cat([update.left.double() for update in updates], dim=1))
    rights = [torch.linalg.qr(update.right.double()) for update in updates]
    core = triangle @ torch.block_diag(*[right_triangle.T for _, right_triangle in rights])
    inner_left, values, inner_right = torch.linalg.svd(core, full_matrices=False)
    dtype = updates[0].left.dtype
    kept = values > 16 * torch.finfo(dtype).eps * values[:1] if len(values) else values > 0
    basis = (left @ inner_left[:, kept]).to(dtype)
    parts = inner_right[kept].split([update.rank for update in updates], dim=1)
    scaled = values[kept, None]
    coordinates = [((scaled * part) @ right.T).to(dtype) for part, (right, _) in zip(parts, rights, strict=True)]
    return Space(coordinates, lambda merged: LowRank(basis, merged.T))


def core_space(updates: Sequence[LowRank]) -> Space:
    """Core space (arXiv 2509.17786): ``C_t = U_B^T dW_t V_A``, with U_B the left singular vectors of the stacked B
    and V_A the right ones of the stacked A; nothing is lost.

    Any orthonormal bases would do for rules that do not look at coordinates; those that do get the paper's.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank, shared_cores

    shared = shared_cores(updates)
    rotations = []
    for basis, factors in ((shared.left, "left"), (shared.right, "right")):
        stacked = torch.cat([getattr(update, factors) for update in updates], dim=1)
        rotations.append(torch.linalg.svd(basis.double().T @ stacked.double(), full_matrices=False)[0])
    left, right = (rotation.to(shared.left.dtype) for rotation in rotations)
    bases = shared.left @ left, shared.right @ right
    return Space(
        [left.T @ core @ right for core in shared.cores],
        lambda merged: LowRank(bases[0] @ merged, bases[1]),
    )


def compressed_space(updates: Sequence[LowRank], rank: int, balance: float) -> Space:
    """Compress then merge (arXiv 2606.03723): one pair of rank-``rank`` bases for all adapters, U (m, r) and
    V (n, r), from a Tucker decomposition of their normalised updates; adapter t is ``U^T dW_t V``.

    Higher-order orthogonal iteration, started from the singular vectors of the stacked updates, in core space.

    Args:
        balance: beta; adapters enter with norm ``beta ||dW_t|| + (1 - beta) mean norm``.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank, shared_cores

    shared = shared_cores(updates)
    cores = torch.stack([core.double() for core in shared.cores])
    norms = torch.linalg.matrix_norm(cores)
    wanted = balance * norms + (1 - balance) * norms.mean()
    factors = torch.where(norms > 0, wanted / norms, torch.zeros_like(norms))
    left, right = _tucker2(cores * factors[:, None, None], rank)
    dtype = shared.left.dtype
    bases = shared.left @ left.to(dtype), shared.right @ right.to(dtype)
    return Space(
        [(left.T @ core @ right).to(dtype) for core in cores],
        lambda merged: LowRank(bases[0] @ merged, bases[1]),
    )


_MOST_ROUNDS = 1000
_SETTLED = 1e-6


def _tucker2(stack: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal U (p, r) and V (q, r) that keep the most of ``sum_t ||U^T N_t V||^2`` of a (T, p, q) stack."""
    import torch

    total = float(stack.square().sum())
    left = _leading(torch.cat(list(stack), dim=1), rank)
    right = _leading(torch.cat(list(stack.mT), dim=1), rank)
    before = -1.0
    for _ in range(_MOST_ROUNDS):
        left = _leading(torch.cat(list(stack @ right), dim=1), rank)
        right = _leading(torch.cat(list(stack.mT @ left), dim=1), rank)
        kept = float((left.T @ stack @ right).square().sum())
        if kept - before <= _SETTLED * total:
            break
        before = kept
    return left, right


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    import torch

    basis: torch.Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return basis[:, :rank]


def calibrated(updates: Sequence[LowRank]) -> list[LowRank]:
    """Pico (arXiv 2604.16826): the directions that the B factors of many adapters share are damped before merging.

    ``[B_1 .. B_T] = U diag(s) V^T``, ``p_j = s_j^2 / sum s^2``, ``a_j = 1 / (1 + (T - 1) p_j)``; every B becomes
    ``(I + U diag(a - 1) U^T) B``.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank

    basis, values, _ = torch.linalg.svd(torch.cat([u.left.double() for u in updates], dim=1), full_matrices=False)
    energy = values.square()
    total = float(energy.sum())
    if total == 0:
        return list(updates)
    damping = 1 / (1 + (len(updates) - 1) * energy / total) - 1
    return [
        LowRank((left + basis @ (damping[:, None] * (basis.T @ left))).to(update.left.dtype), update.right)
        for update in updates
        for left in [update.left.double()]
    ]


def robust_merge(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]) -> LowRank:
    """RobustMerge (arXiv 2502.17159): on the factors, not on their products, so that B_i meets A_j.

    Of each factor the fifth of largest magnitude stays. ``s_t = sum|A_t| / sum|kept A_t|`` by row, entries below
    the 80th percentile raised to it; ``A = 2 sum_t A_t``, ``B = 2 sum_t B_t diag(s_t) / sum_t s_t``.

    Args:
        pairs: ``(B, A)`` of equal ranks, the scale within B.
        weights: shares of the adapters, 1 / T each for the paper's rule.
    """
    import torch

    from mergekit_px.kernels.low_rank import LowRank

    count = len(pairs)
    total_b, total_a = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    total_s = total_a.new_zeros(len(total_a))
    for (b, a), weight in zip(pairs, weights, strict=True):
        kept_a, kept_b = _largest_fifth(a), _largest_fifth(b)
        size = kept_a.abs().sum(dim=1)
        ratio = torch.where(size > 0, a.abs().sum(dim=1) / size, torch.ones_like(size))
        scale = ratio.clamp(min=float(ratio.sort().values[int(0.8 * len(ratio))]))
        share = 2 * count * weight
        total_a, total_b, total_s = total_a + share * kept_a, total_b + share * kept_b * scale, total_s + scale
    return LowRank(total_b / total_s, total_a.T)


def _largest_fifth(factor: torch.Tensor) -> torch.Tensor:
    import torch

    magnitudes = factor.abs()
    cut = magnitudes.flatten().kthvalue(max(1, int(factor.numel() * 0.8))).values
    return torch.where(magnitudes >= cut, factor, torch.zeros_like(factor))


def isotropic(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values above rounding replaced by their mean (Iso-C, arXiv 2502.04959, on the numerical rank)."""
    import torch

    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = values > 16 * torch.finfo(matrix.dtype).eps * values[:1]
    if not bool(kept.any()):
        return matrix
    polar: torch.Tensor = left[:, kept] @ right[kept]
    return polar.mul_(values[kept].mean()).to(matrix.dtype)
