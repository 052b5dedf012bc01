"""Singular value calibration of a merged delta by the sources it was merged from (SVC, arXiv:2602.05536)."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_px.errors import NonFiniteError
from mergekit_px.kernels.svd import truncated_svd

_ROWS = 256
"""Output directions looked at together."""


class Calibration:
    """Divides each singular value of a merge by how much it over-counts the sources.

    With ``M = U diag(s) V'``, ``a = U'M`` and ``a_i = U'D_i``, the response of source i along output direction j is
    ``g_ij = <a_j, a_ij> / ||a_ij||^2``, and ``s_j`` becomes ``s_j / mean_i max(floor, g_ij)``. A direction that
    every source has in full (``g = T``) shrinks T-fold; one that the merge has lost grows, at most by ``1 / floor``.
    Null directions of the merge stay null.

    Args:
        merged: (m, n) merged delta.
        floor: positive; 1/T in the paper, 1 for a merge by TSV-M.
        label: name of the tensor, for errors.
    """

    def __init__(self, merged: Tensor, floor: float, label: str = "") -> None:
        self._label = label
        self._left = truncated_svd(merged, label=label).u
        self._response = self._left.T @ merged
        self._floor = floor
        self._total = torch.zeros(self._left.shape[1], dtype=torch.float64, device=merged.device)
        self._count = 0

    def add(self, delta: Tensor) -> None:
        """Take the (m, n) delta of the next source into account.

        Raises:
            NonFiniteError: a NaN or an infinity in the delta.
        """
        for start in range(0, len(self._total), _ROWS):
            rows = slice(start, start + _ROWS)
            own = (self._left[:, rows].T @ delta).double()
            size = own.square().sum(1)
            if not bool(torch.isfinite(size).all()):
                raise NonFiniteError("a delta holds a NaN or an infinity", where=self._label or None)
            along = own.mul_(self._response[rows]).sum(1)
            self._total[rows] += (along / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(self._floor)
        self._count += 1

    def result(self) -> Tensor:
        """(m, n) calibrated delta."""
        factor = (self._count / self._total).to(self._response.dtype)
        return self._left @ (factor[:, None] * self._response)
