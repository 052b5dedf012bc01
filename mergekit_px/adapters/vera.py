"""VeRA: W + diag(b) B diag(d) A, with A and B random and shared by all layers (arXiv 2310.11454, eq. 2).

A layer uses the first rows of B and the first columns of A that it needs; there is no alpha. Where the projections
are not in the file they are drawn again as PEFT does: Kaiming-uniform from torch's CPU generator, A before B, in
the size of the largest adapted layer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import Factors, LowRankPatch, Patch, get, onto
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"})


@dataclass(frozen=True, kw_only=True, eq=False)
class VeraPatch(LowRankPatch):
    """diag(b) B[:out] diag(d) A[:, :in].

    Attributes:
        drawn: ``(seed, r, in, out)`` of the projections where they are not stored.
    """

    drawn: tuple[int, int, int, int] | None = None

    def pair(self, factors: Factors, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.drawn is None:
            down, up = get(factors, "A", like), get(factors, "B", like)
        else:
            down, up = (matrix.to(device=like.device, dtype=like.dtype) for matrix in projections(*self.drawn))
        out, inside = self.out_shape[::-1] if self.transposed else self.out_shape
        left = up[:out] * get(factors, "b", like)[:, None]
        right = down[:, :inside] * get(factors, "d", like)[:, None]
        return (right.T, left.T) if self.transposed else (left, right)


@functools.lru_cache(maxsize=1)
def projections(seed: int, rank: int, inside: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as PEFT draws them: uniform in +-sqrt(6 / fan_in)."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return draw(rank, inside), draw(out, rank)


def bind(module: Module, binder: Binder) -> list[Patch]:
    if not module.path:
        return []  # the shared projections
    config = binder.config
    factors = roles(module, config, {"b": "vera_lambda_b", "d": "vera_lambda_d"}, (1, 1))
    only(module, config, {"vera_lambda_b", "vera_lambda_d"})
    weight = binder.weight(module)
    out, rank = factors["b"].shape[0], factors["d"].shape[0]
    if len(weight.shape) != 2 or out not in weight.shape:
        raise binder.clash(weight, (out,))
    inside = _inputs(weight, out)
    transposed = binder.orientation(weight, out, inside)
    shared = binder.modules.get("")
    drawn = None
    if shared is not None:
        stored = roles(shared, config, {"A": "vera_A", "B": "vera_B"}, (2, 2))
        if (
            stored["A"].shape[0] != rank
            or stored["B"].shape[1] != rank
            or stored["A"].shape[1] < inside
            or stored["B"].shape[0] < out
        ):
            raise config.error(f"the shared projections are of other sizes than {weight.name}")
        factors |= stored
    else:
        largest_in, largest_out = _largest(binder)
        drawn = (int(config.number("projection_prng_key", 0)), rank, largest_in, largest_out)
    return [VeraPatch(**onto(weight), factors=factors, rank=rank, transposed=transposed, drawn=drawn)]


def _inputs(weight: StoredTensor, out: int) -> int:
    return weight.shape[1] if weight.shape[0] == out else weight.shape[0]


def _largest(binder: Binder) -> tuple[int, int]:
    """The widest input and output among the adapted layers."""
    shapes = []
    for module in binder.modules.values():
        out = roles(module, binder.config, {"b": "vera_lambda_b"}, (1, 1))["b"].shape[0]
        shapes.append((_inputs(binder.weight(module), out), out))
    return max(inside for inside, _ in shapes), max(out for _, out in shapes)
