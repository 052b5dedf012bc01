"""Essential subspaces: components of what a source changes in the outputs of a layer, merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mergekit_px.methods.declare import merge_method
from mergekit_px.methods.matrices import Case, MatrixMerge, component_count, merge_matrices
from mergekit_px.methods.regmean import GRAM
from mergekit_px.methods.tsv_m import TsvMParams, tsv_m

if TYPE_CHECKING:
    import torch


class EsmParams(TsvMParams):
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Factor of the matrices that have statistics."""
    polarise: Annotated[float, Field(ge=0, le=8)] = 2.0
    """Exponent by which sources, and columns, of more than mean norm are favoured; 0 treats all alike."""
    spread: Annotated[float, Field(ge=0, le=2)] = 0.15
    """Exponent of the shares of components in the variance; 0 gives all components the same weight."""


@merge_method(
    family="statistics",
    space="deltas",
    access="tensor",
    centred=True,
    paper="arXiv:2602.20208",
    companions=GRAM,
    scratch=16.0,
)
def esm(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: EsmParams,
    load_base: Callable[[], torch.Tensor] | None,
    name: str,
) -> torch.Tensor:
    """Merge the directions in which sources change a layer's outputs on their own inputs (ESM, essential subspaces).

    For an (m, n) matrix and T sources with Gram matrices ``G_t`` of their inputs, ``U_t, e_t`` are the leading
    ``k = floor(m / T)`` eigenvectors and eigenvalues of ``D_t G_t D_t'``, which is the principal component analysis
    of the change of the outputs. With ``a = (e / mean(e))^spread``, divided by its mean, ``U`` is the stack of
    ``U_t diag(a_t)``, and ``V`` that of ``diag(a_t) U_t' D_t`` times ``(|D_t| / mean |D|)^polarise``, whose columns are
    multiplied by their norm over the mean column norm to the same power. The merged delta is ``gain polar(U) polar(V)``
    times the mean singular values of ``U`` and of ``V`` (as the authors' code has it, which tries several scales of
    the whole on validation data and multiplies each layer by its norm over that of the others of its kind, which is
    not done here). Without Gram matrices a matrix is merged by ``tsv_m``. All other tensors, and
    embeddings unless wanted, get the mean of the deltas. The sources are the models and then, in the same order, the
    files that ``pxmerge stats --what gram`` made of them.

    Raises:
        NonFiniteError: a NaN or an infinity in a delta or a Gram matrix.
        TensorMismatchError: sources of different shapes.
    """
    count = len(weights)
    if len(deltas) == count:
        return tsv_m(deltas, weights, params, name, load_base)

    def merge(case: Case) -> MatrixMerge:
        return _esm(case, params, lambda source: deltas[count + source])

    return merge_matrices(deltas[:count], weights, params, merge, name=name)


def _esm(case: Case, params: EsmParams, gram: Callable[[int], torch.Tensor]) -> MatrixMerge:
    import torch

    rows = case.shape[0]
    rank = max(1, rows // case.count) if params.rank is None else component_count(params.rank, rows)
    left, right, norms = [], [], []
    for source in range(case.count):
        delta = (yield).pop().double()
        parts = case.svd(delta @ _root(gram(source), case.label), rank)
        variances = torch.zeros(rank, dtype=delta.dtype, device=delta.device)
        variances[: parts.rank] = parts.s.double().square()
        shares = (variances / _above_zero(variances.mean())) ** params.spread
        shares = (shares / _above_zero(shares.mean()))[: parts.rank]
        left.append(parts.u.double() * shares)
        right.append((parts.u.double().T @ delta) * shares[:, None])
        norms.append(delta.norm())
    mean = _above_zero(torch.stack(norms).mean())
    stack = torch.cat([one * (norm / mean) ** params.polarise for one, norm in zip(right, norms, strict=True)])
    columns = stack.norm(dim=0)
    stack *= (columns / _above_zero(columns.mean())) ** params.polarise
    outputs, inputs = (min(side, rank * case.count) for side in case.shape)
    return params.gain * _levelled(torch.cat(left, dim=1), outputs, case.label) @ _levelled(stack, inputs, case.label)


def _root(gram: torch.Tensor, label: str) -> torch.Tensor:
    """A matrix R with ``R R' = G``."""
    import torch

    from mergekit_px.errors import NonFiniteError

    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("a NaN or an infinity in a Gram matrix", where=label)
    values, vectors = torch.linalg.eigh(gram.double())
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _levelled(matrix: torch.Tensor, size: int, label: str) -> torch.Tensor:
    """The polar factor, times the mean of so many singular values, of which those that are zero may be missing."""
    from mergekit_px.kernels.polar import polar_factor

    if not matrix.numel():
        return matrix
    polar = polar_factor(matrix, label=label)
    return polar.factor * (polar.nuclear_norm / size)


def _above_zero(value: torch.Tensor) -> torch.Tensor:
    """One instead of zero, where all that is divided is zero."""
    import torch

    return torch.where(value > 0, value, torch.ones_like(value))
