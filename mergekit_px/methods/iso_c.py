"""Isotropic merging in the common subspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import PAPER, Case, MatrixMerge, NoiseParams, merge_matrices, sum_of

if TYPE_CHECKING:
    import torch


class IsoCParams(NoiseParams):
    pass


@merge_method(
    family="spectral",
    space="deltas",
    access="tensor",
    centred=True,
    paper="arXiv:2502.04959",
    scratch=3.5,
    presets={"paper": {**PAPER, "noise_floor": False}},
)
def iso_c(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: IsoCParams,
    load_base: Callable[[], torch.Tensor] | None,
    name: str,
) -> torch.Tensor:
    """Flatten the singular values of the summed task vectors (isotropic merging, Iso-C).

    With ``sum_t w_t D_t = U diag(s) V'``, the merged delta is ``mean(s) U V'`` (Marczak et al.). Mean and
    product run over the numerical rank, and over what exceeds the rounding noise of 16-bit checkpoints: the others
    are directions without meaning, which would get the same singular value. All other tensors, and embeddings unless
    wanted, get the mean of the deltas. ``scale`` (alpha) multiplies everything; the paper finds 1.3, 1.0 and 0.9
    best for 8, 14 and 20 vision tasks.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta.
        TensorMismatchError: sources of different shapes.
    """

    def merge(case: Case) -> MatrixMerge:
        return _iso_c(case, params)

    return merge_matrices(deltas, weights, params, merge, name=name, load_base=load_base)


def _iso_c(case: Case, params: IsoCParams) -> MatrixMerge:
    from mergekit_px.kernels.polar import polar_factor

    total = yield from sum_of(case)
    edge = case.sum_edge()
    polar = polar_factor(total, floor=edge if params.noise_floor else 0.0, overwrite=True, label=case.label)
    if polar.rank == 0 and bool(total.any()):
        case.notes.append("the sum does not exceed rounding noise; nothing was clipped")
        polar = polar_factor(total, overwrite=True, label=case.label)
    elif not params.noise_floor and polar.values is not None and (below := int((polar.values <= edge).sum())):
        case.notes.append(f"{below} of {polar.rank} components lie below rounding noise ({edge:.2g}) and are amplified")
    case.notes += polar.notes
    return polar.factor.mul_(polar.mean_value)
