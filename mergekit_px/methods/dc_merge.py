"""DC-Merge: task vectors of equal strengths, in a shared orthogonal basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergekit_px.methods.matrices import PAPER, Case, Count, MatrixMerge, NoiseParams, matrix_method
from mergekit_px.methods.tsv_m import leading_components

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.svd import SVD

_STEEPEST = 5.0
"""Largest ratio of the first to the last value after linear smoothing (rho in the authors' code)."""


class DcMergeParams(NoiseParams):
    rank: Count | None = None
    """Components of each source, a number or a percentage of the rank; an equal share of the rank if left out."""
    smoothing: Literal["none", "linear", "flat"] = "flat"
    """Strengths of a source's components, whose sum stays: as they are, falling evenly by a factor of 5 at most, or
    all alike."""
    cores: Literal["sum", "elect"] = "sum"
    """How the sources' cores become one: their sum, or the mean of those that agree in sign, of the largest elements
    only."""
    density: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Share of the elements of each core that takes part in an election."""


@matrix_method(
    paper="arXiv:2603.06242",
    scratch=12.0,
    presets={"paper": {**PAPER, "smoothing": "none", "cores": "elect", "noise_floor": False}},
    uses_base=True,
)
def dc_merge(case: Case, params: DcMergeParams) -> MatrixMerge:
    """Balance the strengths of the sources' directions and merge in a shared basis (DC-Merge, directional consistency).

    For an (m, n) matrix and T sources, the ``k = floor(min(m, n) / T)`` leading components ``U_t, s_t, V_t`` of each
    ``w_t D_t`` get smoother strengths. With ``P = polar([U_1 .. U_T])`` and ``Q = polar([V_1 .. V_T])``, the cores
    ``P' U_t diag(s_t) V_t' Q`` become one, of which the T blocks on the diagonal, one for each source, stay: the
    merged delta is ``P C Q'`` (Zhang et al.). The ``paper`` variant is the authors' script for full fine-tunes, which
    does not smooth and elects signs among the largest 0.1 % of each core. On the project's own digits a scale
    near 2 was best, where it was level with TSV-M; at 1 it was 3 points behind. Components beyond a source's
    numerical rank, or within the rounding noise of 16-bit checkpoints, are left out. All other tensors, and
    embeddings unless wanted, get the mean of the deltas. ``scale`` (alpha) multiplies everything.
    """
    import torch

    from mergekit_px.kernels.pool import stack_factor

    found = yield from leading_components(case, params.rank, params.noise_floor)
    us, vs = [parts.u * smoothed(parts, params.smoothing) for parts in found], [parts.v for parts in found]
    del found
    units = [left / torch.linalg.vector_norm(left, dim=0).clamp(min=torch.finfo(left.dtype).tiny) for left in us]
    left, _ = stack_factor(units, case.label, case.notes)
    right, _ = stack_factor(list(vs), case.label, case.notes)
    if params.cores == "elect":
        core = _elected(lambda: ((left.T @ u) @ (v.T @ right) for u, v in zip(us, vs, strict=True)), params.density)
    else:
        core = (left.T @ torch.cat(us, dim=1)) @ (torch.cat(vs, dim=1).T @ right)
    merged, start = left.new_zeros(case.shape), 0
    for u in us:
        block = slice(start, start + u.shape[1])
        merged.addmm_(left[:, block] @ core[block, block], right[:, block].T)
        start += u.shape[1]
    return merged


def smoothed(parts: SVD, how: Literal["none", "linear", "flat"]) -> torch.Tensor:
    """Singular values of the same sum that are more alike."""
    import torch

    values = parts.s
    if how == "none" or len(values) == 0:
        return values
    ratio = min(_STEEPEST, float(values[0] / values[-1])) if how == "linear" else 1.0
    shares = torch.linspace(ratio, 1.0, len(values), dtype=values.dtype, device=values.device)
    return shares * (values.sum() / shares.sum())


def _elected(cores: Callable[[], Iterable[torch.Tensor]], density: float) -> torch.Tensor:
    """The mean over the cores whose sign in an element is that of the sum, of each core's largest elements.

    The cores are made twice, so that one is held at a time.
    """
    import torch

    from mergekit_px.methods.pruning import kept_count

    def largest() -> Iterable[torch.Tensor]:
        for core in cores():
            kept = kept_count(density, core.numel())
            cut = core.abs().flatten().kthvalue(core.numel() - kept + 1).values if kept else float("inf")
            yield torch.where(core.abs() >= cut, core, 0.0)

    sign = sum(largest(), torch.zeros(())).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for core in largest():
        agrees = (core.sign() == sign) & (core != 0)
        total += core * agrees
        count += agrees
    return total.div_(count.clamp_(min=1))
