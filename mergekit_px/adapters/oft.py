"""OFT: W R^T with R block-diagonal and orthogonal, from skew-symmetric Q (arXiv 2306.07280; Neumann form 2506.19847).

The exact Cayley form is R = (I + Q)^-1 (I - Q). The Neumann form that PEFT has by default is a truncated series,
R = I + 2Q + 2Q^2 + ... + 2Q^(n-2) + Q^(n-1) for n terms, whose limit is the exact form of -Q: the sign is part of
the format. An embedding (vocabulary, dimension) becomes E R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, BindOptions, only, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import Factors, Patch, columns, get, onto, present
from mergekit_px.adapters.peft_keys import Module

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"oft_R", "oft_embedding_R"})


@dataclass(frozen=True, kw_only=True, eq=False)
class OftPatch(Patch):
    """Each block of ``block`` columns times its rotation; a single stored rotation serves all blocks.

    Attributes:
        neumann_terms: n of the series; None for the exact form.
        constraint: COFT's bound on the norm of Q, as configured (it is divided by the root of the number of
            stored blocks); None for none.
        embedding: E R instead of W R^T.
    """

    block: int
    neumann_terms: int | None
    constraint: float | None = None
    embedding: bool = False

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        skew = skew_symmetric(get(factors, "R", block), self.block)
        if self.constraint is not None:
            bound = self.constraint / math.sqrt(skew.shape[0])
            norm = skew.flatten(1).norm(dim=1).reshape(-1, 1, 1)
            skew = skew * (bound / norm).clamp(max=1.0).nan_to_num(nan=1.0)
        rotation = cayley(skew) if self.neumann_terms is None else cayley_neumann(skew, self.neumann_terms)
        if not self.embedding:
            rotation = rotation.transpose(1, 2)
        blocks = block.reshape(block.shape[0], -1, self.block).transpose(0, 1)
        rotated: torch.Tensor = blocks @ rotation
        return rotated.transpose(0, 1).reshape(block.shape)


def skew_symmetric(upper: torch.Tensor, size: int) -> torch.Tensor:
    """(n, b (b - 1) / 2) above the diagonal, row by row -> (n, b, b)."""
    import torch

    matrix = upper.new_zeros(upper.shape[0], size, size)
    row, column = torch.triu_indices(size, size, 1, device=upper.device)
    matrix[:, row, column] = upper
    return matrix - matrix.transpose(1, 2)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I + Q)^-1 (I - Q) for each block; the two factors commute."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew)
    return rotation


def cayley_neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """The truncated series with that many terms."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms <= 2:
        return identity + (2 * skew if terms == 2 else 0)
    result, power = identity + 2 * skew, skew
    for exponent in range(2, max(terms, 4)):
        power = power @ skew
        result = result + (power if exponent == max(terms, 4) - 1 else 2 * power)
    return result


def check(config: AdapterConfig, options: BindOptions) -> None:
    """Raises AdapterError for the format before PEFT 0.14, and for Neumann forms before 0.18."""
    if "oft_block_size" not in config.values:
        raise config.error("cannot be merged: this is the OFT format before PEFT 0.14, which stored other parameters")
    version = config.peft_version
    if config.flag("use_cayley_neumann") and version is not None and version < (0, 18):
        raise config.error("cannot be merged: PEFT changed its Cayley-Neumann form in 0.18, this adapter is older")


def bind(module: Module, binder: Binder) -> list[Patch]:
    config = binder.config
    embedding = "oft_embedding_R" in module.tensors
    parameter = "oft_embedding_R" if embedding else "oft_R"
    stored = roles(module, config, {"R": parameter}, (2, 2))["R"]
    only(module, config, {parameter})
    weight = binder.weight(module)
    size = math.isqrt(2 * stored.shape[1]) + 1
    width = columns(weight.shape)
    blocks = 1 if config.flag("block_share") else width // size
    if size * (size - 1) // 2 != stored.shape[1] or width % size or stored.shape[0] != blocks:
        raise binder.clash(weight, (weight.shape[0], size * stored.shape[0]))
    neumann = config.flag("use_cayley_neumann")  # files without the field are from before there was a choice
    return [
        OftPatch(
            **onto(weight),
            factors={"R": stored},
            block=size,
            neumann_terms=int(config.number("num_cayley_neumann_terms", 5)) if neumann else None,
            constraint=config.number("eps", 6e-5) if config.flag("coft") else None,
            embedding=embedding,
        )
    ]
