"""Rotations of a layer's inputs, and their logarithms of a kind: Cayley's map between them and skew matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_px.kernels.polar import polar_factor


def procrustes_rotation(start: Tensor, end: Tensor, ridge: float, label: str) -> Tensor:
    """The orthogonal (n, n) matrix R with ``start @ R`` nearest to ``end``, both (m, n), in float64.

    ``ridge``, in shares of the mean square norm of start's columns, draws R towards doing nothing, which also decides
    what it does along directions that start does not have.
    """
    cross = start.double().T @ end.double()
    size = float(start.double().square().sum()) / start.shape[1]
    cross.diagonal().add_(ridge * size if size else 1.0)
    return polar_factor(cross, relative_floor=0.0, label=label).factor


def skew_of(rotation: Tensor) -> Tensor:
    """``A = (R + I)^-1 (R - I)``, made exactly skew; R has no eigenvalue of -1."""
    one = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    skew: Tensor = torch.linalg.solve(rotation + one, rotation - one)
    return (skew - skew.T) / 2


def rotation_of(skew: Tensor) -> Tensor:
    """``R = (I - A)^-1 (I + A)``."""
    one = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(one - skew, one + skew)
    return rotation
