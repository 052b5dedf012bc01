"""A tensor of a model as a matrix W = B A + R, trained in B and A.

The model keeps its own parameter W and never hears of the factors: before each of its steps W is made from them, and
after each backward pass dL/dB = G A' and dL/dA = B' G follow from G = dL/dW. So any model and any loss will do, tied
weights included, and the model is at every moment an ordinary checkpoint.

Source of B and A: MergeNet (arXiv 2404.13322), section 3, which leaves open how they come about. Here they are the
singular value decomposition at load, B = U S^1/2 and A = S^1/2 V', and parameters from then on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_px.errors import NonFiniteError
from mergekit_px.kernels.svd import truncated_svd
from mergekit_px.learn.data import derived_seed
from mergekit_px.learn.transfer.ranks import matrix_shape


class Factors:
    """The factors of one tensor.

    Args:
        weight: the model's parameter, of any shape with two dimensions or more.
        rank: columns of B; None exchanges the matrix itself: A is W, and there is no B.
        residual: keep R = W - B A as it is at load. Without it the model loses R at once.
        label: names the tensor; errors show it, and what random numbers there are depend on it.
        seed: for the rows of A that a matrix of lower rank leaves open.

    Attributes:
        address: A, shape (rank, columns), float32 or float64; what is exchanged.
        basis: B, shape (rows, rank); None where the matrix itself is exchanged.
    """

    def __init__(self, weight: Tensor, rank: int | None, *, residual: bool, label: str, seed: int) -> None:
        self.weight = weight
        self.label = label
        rows, columns = matrix_shape(tuple(weight.shape))
        precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().reshape(rows, columns).to(precision)
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError("a NaN or an infinity", where=label)
        self.basis: nn.Parameter | None = None
        if rank is None:
            self.address = nn.Parameter(matrix.clone())
        else:
            basis, address = _factorised(matrix, rank, label, seed)
            self.basis, self.address = nn.Parameter(basis), nn.Parameter(address)
        self._start: tuple[Tensor, Tensor, Tensor] | None = None
        if residual and self.basis is not None:
            self._start = (matrix.clone(), self.basis.detach().clone(), self.address.detach().clone())
        elif self.basis is not None:
            self.write()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """B and A, or A alone."""
        return [self.address] if self.basis is None else [self.basis, self.address]

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """B A + R, shape (rows, columns)."""
        if self.basis is None:
            return self.address.detach()
        product = self.basis @ self.address
        if self._start is None:
            return product
        # Not R + B A: as long as the factors are what they were, this difference is zero to the last bit.
        start, basis, address = self._start
        return start + (product - basis @ address)

    @torch.no_grad()
    def write(self) -> None:
        """Put the matrix into the model, in the dtype of its parameter."""
        self.weight.copy_(self.matrix().reshape(self.weight.shape))

    @torch.no_grad()
    def take_gradient(self) -> bool:
        """Turn the gradient of W into those of B and A; False where the loss gave W none."""
        if self.weight.grad is None:
            return False
        gradient = self.weight.grad.reshape(matrix_shape(tuple(self.weight.shape))).to(self.address.dtype)
        if self.basis is None:
            self.address.grad = gradient
        else:
            self.basis.grad = gradient @ self.address.T
            self.address.grad = self.basis.T @ gradient
        self.weight.grad = None
        return True

    def state(self) -> dict[str, Tensor]:
        """What must be kept for a run to go on."""
        found = {"address": self.address.detach()}
        if self.basis is not None:
            found["basis"] = self.basis.detach()
        if self._start is not None:
            found.update(zip(("start", "start_basis", "start_address"), self._start, strict=True))
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.address.copy_(state["address"])
        if self.basis is not None:
            self.basis.copy_(state["basis"])
        if self._start is not None:
            for kept, name in zip(self._start, ("start", "start_basis", "start_address"), strict=True):
                kept.copy_(state[name])


def _factorised(matrix: Tensor, rank: int, label: str, seed: int) -> tuple[Tensor, Tensor]:
    """B (rows, rank) and A (rank, columns), balanced.

    A matrix of lower rank, a head that begins at zero for one, leaves factors at a point without gradients if both
    of a component are zero; its rows of A are drawn instead, and its columns of B are zero.
    """
    found = truncated_svd(matrix, rank, mode="dense", label=label)
    root = found.s.sqrt()
    basis = matrix.new_zeros(matrix.shape[0], rank)
    address = matrix.new_zeros(rank, matrix.shape[1])
    basis[:, : found.rank] = found.u * root
    address[: found.rank] = root.unsqueeze(1) * found.v.T
    if found.rank < rank:
        generator = torch.Generator().manual_seed(derived_seed(seed, "factors", label))
        drawn = torch.randn(rank - found.rank, matrix.shape[1], generator=generator, dtype=matrix.dtype)
        address[found.rank :] = drawn.to(matrix.device) / matrix.shape[1] ** 0.5
    return basis, address
