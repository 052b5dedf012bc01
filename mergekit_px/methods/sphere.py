"""What the methods on the sphere share: they see the sources through their Gram matrix alone.

All that they return is a combination of the sources, so that two sweeps of any tensor do: dot products, then the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.methods.declare import Operands

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DotProducts:
    """A sweep: the Gram matrix of the sources, float64, shape (k, k). Its total may be a tensor or an array."""

    def values(self, operands: Operands) -> Sequence[torch.Tensor]:
        return operands.tensors

    def __call__(self, operands: Operands) -> torch.Tensor:
        from mergekit_px.kernels.reduction import gram

        return gram(self.values(operands))


dots = DotProducts()


def cosine_of(gram: torch.Tensor) -> float:
    """The cosine in a Gram matrix of two vectors; 1 if one of them is zero."""
    (first, product), (_, second) = gram.tolist()
    norms = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, product / norms)) if norms > 0 else 1.0


class Directions:
    """The directions of k vectors, known by their Gram matrix.

    A point is an array of k coefficients of the unit vectors.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        import numpy as np

        products = np.asarray(gram)
        self.norms: NDArray[np.float64] = np.sqrt(products.diagonal())
        self._inverse = np.divide(1.0, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0)
        self._metric = products * self._inverse * self._inverse[:, None]

    def size(self, point: NDArray[np.float64]) -> float:
        """The length of a point."""
        return math.sqrt(max(float(point @ self._metric @ point), 0.0))

    def cosines(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """The dot products of a unit point with the unit vectors; 0 for those of zero vectors."""
        cosines: NDArray[np.float64] = self._metric @ point
        return cosines.clip(-1, 1)

    def walk(self, point: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where one arrives from a unit point along a tangent, as far as the tangent is long."""
        angle = self.size(step)
        return math.cos(angle) * point + math.sin(angle) / angle * step if angle > 0 else point

    def coefficients(self, point: NDArray[np.float64], length: float) -> tuple[float, ...]:
        """The coefficients of the vectors themselves in a point drawn out to a length."""
        return tuple((length * point * self._inverse).tolist())
