"""What a spectral merge did to one matrix, as plain data for a report file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_px.kernels.pool import ComponentPool
from mergekit_px.kernels.spectra import (
    alignment,
    alignment_rank,
    effective_rank,
    energy_kept,
    interference,
    rounding_noise_edge,
    source_shares,
    stable_rank,
)
from mergekit_px.kernels.svd import SVD, truncated_svd


def matrix_report(
    name: str,
    deltas: Sequence[Tensor],
    labels: Sequence[str],
    *,
    components: int,
    merged: Tensor | None = None,
    base: Tensor | None = None,
) -> dict[str, Any]:
    """One row of a report: strings, numbers and lists of numbers only.

    ``spectrum``, ``energy_kept`` and the ranks speak of the leading ``components`` of each matrix; energies are exact
    shares of the squared Frobenius norm. ``pool_share`` is each source's part of the energy of the ``components``
    largest singular values of all sources together, ``interference`` the singular task interference of each source's
    share of the rank (arXiv:2412.00081), also relative to the sum of the singular values, and ``alignment`` the
    subspace alignment ratio with the merge (arXiv:2502.04959). ``noise_edge`` is the largest singular value that
    rounding of 16-bit weights explains.

    Args:
        name: of the tensor.
        deltas: (m, n) deltas of the sources, gone through twice where there is a merge, one at a time.
        labels: a name for each source.
        components: leading components looked at, at least 1.
        merged: (m, n) merged delta.
        base: (m, n) base.

    Raises:
        NonFiniteError: a NaN or an infinity in a matrix.
    """
    shape = tuple(deltas[0].shape)
    share = max(1, min(shape) // len(deltas))
    edge = rounding_noise_edge(base) if base is not None else None
    pool = ComponentPool(components, label=name)
    sources: list[dict[str, Any]] = []
    stacks: list[tuple[Tensor, Tensor, Tensor]] = []
    for label, delta in zip(labels, deltas, strict=True):
        # The pool needs no more than its limit, the interference no more than the source's share of the rank.
        parts = truncated_svd(delta, max(components, share), label=name)
        pool.add_components(parts.leading(components))
        stacks.append((parts.u[:, :share], parts.s[:share], parts.v[:, :share]))
        sources.append({"source": label, **_spectrum(parts.leading(components), edge)})
    for row, part in zip(sources, source_shares(pool.s, pool.source, len(deltas)), strict=True):
        row["pool_share"] = part
    u, s, v = (torch.cat(column, dim=-1) for column in zip(*stacks, strict=True))
    total = float(s.double().sum())
    disturbed = interference(u, s, v)
    report: dict[str, Any] = {
        "tensor": name,
        "shape": list(shape),
        "components": components,
        "noise_edge": edge,
        "interference": disturbed,
        "interference_relative": disturbed / total if total > 0 else 0.0,
        "sources": sources,
    }
    if merged is not None:
        parts = truncated_svd(merged, label=name)
        report["merged"] = _spectrum(parts.leading(components), edge)
        basis = parts.u[:, : alignment_rank(parts.s)]
        for row, delta in zip(sources, deltas, strict=True):
            row["alignment"] = alignment(delta, basis)
    return report


def _spectrum(parts: SVD, edge: float | None) -> dict[str, Any]:
    return {
        "norm": math.sqrt(parts.energy),
        "spectrum": [float(value) for value in parts.s],
        "energy_kept": parts.captured_energy,
        "energy_of_first": energy_kept(parts.s, 1) * parts.captured_energy,
        "effective_rank": effective_rank(parts.s),
        "stable_rank": stable_rank(parts.s),
        "identifiable": parts.identifiable,
        "below_noise_edge": None if edge is None else int((parts.s <= edge).sum()),
        "route": parts.mode,
        "notes": list(parts.notes),
    }
