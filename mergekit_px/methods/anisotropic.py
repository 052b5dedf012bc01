"""Task vectors with a coefficient for each block of parameters, read from a file that ``pxmerge ofasd`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import InstanceOf
from pydantic.json_schema import SkipJsonSchema

from mergekit_px.artefacts.coefficients import CoefficientTable, group_numbers, read_table
from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import ArtefactFile, Params, merge_method

if TYPE_CHECKING:
    import torch


class AnisotropicParams(Params):
    coefficients: Annotated[
        str | SkipJsonSchema[InstanceOf[CoefficientTable]] | None, ArtefactFile("coefficients", read_table)
    ] = None
    """File of learned coefficients, or its folder; left out, each coefficient is 1 / number of sources."""

    def of_tensor(self, name: str, sources: int) -> tuple[tuple[float, ...], ...]:
        """For each source the coefficients of a tensor's blocks. Raises ``UsageError``."""
        if not isinstance(self.coefficients, CoefficientTable):
            return ((1.0 / sources,),) * sources
        return self.coefficients.of_tensor(name, sources)

    @property
    def seed(self) -> int:
        """Of the draw that puts elements into blocks."""
        return self.coefficients.seed if isinstance(self.coefficients, CoefficientTable) else 0


@merge_method(family="building block", space="deltas", access="elementwise", paper="arXiv:2407.02880", scratch=1.0)
def anisotropic(deltas: Sequence[torch.Tensor], params: AnisotropicParams, name: str) -> torch.Tensor:
    """Task arithmetic with a learned coefficient for each source and tensor (anisotropic scaling, aTLAS).

    ``base + sum_i c_ij d_i`` in block j (Zhang et al., anisotropic scaling), whatever the shape. The coefficients come
    from a file that ``pxmerge ofasd`` learned for these sources in this order; blocks may span several tensors.
    Without a file the coefficients are equal and add up to 1, which is the plain average.

    Raises:
        InputError: the file is missing or no file of coefficients.
        UsageError: it is of other tensors or of another number of sources, or it splits tensors (see
            ``anisotropic_groups``).
    """
    from mergekit_px.kernels.reduction import weighted_sum

    rows = params.of_tensor(name, len(deltas))
    if len(rows[0]) > 1:
        raise UsageError("the coefficients split tensors into groups", where=name, hint="use anisotropic_groups")
    return weighted_sum(deltas, [row[0] for row in rows])


@merge_method(family="building block", space="deltas", access="tensor", paper="arXiv:2407.02880", scratch=4.0)
def anisotropic_groups(deltas: Sequence[torch.Tensor], params: AnisotropicParams, name: str) -> torch.Tensor:
    """Task arithmetic with a learned coefficient for each source and random group of elements (aTLAS).

    ``base + sum_i c_ig d_i`` for the elements of group g (Zhang et al., the variant with K groups for each tensor),
    whatever the shape. The file says how many groups each tensor has and the seed by which elements belong to them.

    Raises:
        InputError: the file is missing or no file of coefficients.
        UsageError: it is of other tensors or of another number of sources.
    """
    import torch

    from mergekit_px.kernels.reduction import weighted_sum

    rows = params.of_tensor(name, len(deltas))
    if len(rows[0]) == 1:
        return weighted_sum(deltas, [row[0] for row in rows])
    first = deltas[0]
    groups = group_numbers(params.seed, name, first.numel(), len(rows[0]), first.device).view(first.shape)
    total = torch.zeros_like(first)
    for index, row in enumerate(rows):
        total.addcmul_(deltas[index], torch.tensor(row, dtype=first.dtype, device=first.device)[groups])
    return total
