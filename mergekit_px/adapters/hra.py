"""HRA: W H_1 ... H_r, Householder reflections of the inputs (arXiv 2405.17484).

The columns of u (in, r) are normalised; with ``apply_GS`` they are made orthonormal first, and the product becomes
I - 2 U U^T. A convolution's kernel is flattened into its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import Factors, Patch, columns, get, onto, present
from mergekit_px.adapters.peft_keys import Module

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"hra_u"})


@dataclass(frozen=True, kw_only=True, eq=False)
class HraPatch(Patch):
    """W times the reflections, one after the other."""

    orthonormal: bool

    @property
    def scratch(self) -> float:
        return 2.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        import torch

        block = present(base)
        vectors = get(factors, "u", block)
        flat = block.reshape(block.shape[0], -1)
        if self.orthonormal:
            basis, _ = torch.linalg.qr(vectors)
            return flat.addmm(flat @ basis, basis.T, alpha=-2).reshape(block.shape)
        for vector in (vectors / vectors.norm(dim=0)).T:
            flat = flat.addr(flat @ vector, vector, alpha=-2)
        return flat.reshape(block.shape)


def bind(module: Module, binder: Binder) -> list[Patch]:
    factors = roles(module, binder.config, {"u": "hra_u"}, (2, 2))
    only(module, binder.config, set(PARAMETERS))
    weight = binder.weight(module)
    shape = factors["u"].shape
    if len(weight.shape) < 2 or shape[0] != columns(weight.shape):
        raise binder.clash(weight, (*weight.shape[:1], shape[0]))
    return [HraPatch(**onto(weight), factors=factors, orthonormal=binder.config.flag("apply_GS"))]
