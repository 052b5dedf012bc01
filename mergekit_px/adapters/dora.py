"""DoRA: a learned magnitude for each output of a layer, around the direction of W + dW (arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder
from mergekit_px.adapters.patch import Access, AdditivePatch, Factors, Patch, get, present, taken
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class DoraPatch(Patch):
    """m V / norm(V) with V = W + s dW, the norm over all axes but one.

    Each magnitude belongs to an index of ``axis``: 0 for the outputs of a linear or convolution layer (then rows
    are independent), 1 for a layer stored (in, out), for the dimensions of an embedding (vocabulary, dimension),
    and for the files of LyCORIS that decompose by input. The norm is always of the merged V: where several adapters
    are applied in turn, of the weight with the earlier ones merged.
    """

    inner: AdditivePatch
    axis: int = 0

    @property
    def access(self) -> Access:
        return "rows" if self.axis == 0 else "tensor"

    @property
    def scratch(self) -> float:
        return self.inner.scratch + 1.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        import torch

        block = self.inner.merged(present(base), factors, rows)
        others = [axis for axis in range(block.dim()) if axis != self.axis]
        norm = torch.linalg.vector_norm(block, dim=others, keepdim=True)
        magnitude = get(factors, "magnitude", block).flatten()
        if self.axis == 0:
            magnitude = taken(magnitude, rows)
        factor = magnitude.reshape(norm.shape) / norm
        # a row of zeros stays zero: there is no direction to give a magnitude to
        return block * torch.where(norm > 0, factor, torch.zeros_like(factor))


def decomposed(inner: AdditivePatch, magnitude: StoredTensor, axis: int, binder: Binder) -> DoraPatch:
    """Wrap an additive patch. Raises AdapterError where the magnitudes do not fit the axis."""
    count = math.prod(magnitude.shape)
    if count != inner.out_shape[axis]:
        raise binder.error(f"{magnitude.name} has {count} magnitudes, {inner.target} needs {inner.out_shape[axis]}")
    return DoraPatch(
        target=inner.target,
        source=inner.source,
        out_shape=inner.out_shape,
        factors={**inner.factors, "magnitude": magnitude},
        inner=inner,
        axis=axis,
    )
