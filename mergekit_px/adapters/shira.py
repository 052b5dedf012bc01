"""SHiRA: W plus a few entries, stored with their places (arXiv 2406.13175). The scale is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.patch import AdditivePatch, Factors, Patch, get, onto
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.errors import AdapterError

if TYPE_CHECKING:
    import torch

PARAMETERS = frozenset({"shira_weight", "shira_indices"})


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiraPatch(AdditivePatch):
    """A sparse sum: ``values`` (n) at ``places`` (2, n); entries of the same place add up."""

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        import torch

        values = get(factors, "values", like)
        row, column = factors["places"].to(device=like.device, dtype=torch.int64)
        outside = (row < 0) | (row >= self.out_shape[0]) | (column < 0) | (column >= self.out_shape[1])
        if bool(outside.any()):
            raise AdapterError("a place is outside of the matrix", where=self.factors["places"].name)
        start, height = (0, self.out_shape[0]) if rows is None else (rows.start, rows.stop - rows.start)
        inside = (row >= start) & (row < start + height)
        result = torch.zeros_like(like)
        return result.index_put_((row[inside] - start, column[inside]), values[inside], accumulate=True)


def bind(module: Module, binder: Binder) -> list[Patch]:
    factors = roles(module, binder.config, {"values": "shira_weight", "places": "shira_indices"})
    only(module, binder.config, set(PARAMETERS))
    weight = binder.weight(module)
    count = factors["values"].shape
    if len(weight.shape) != 2 or factors["places"].shape != (2, *count):
        raise binder.error(f"{factors['places'].name} does not give a place in a matrix to each value")
    return [ShiraPatch(**onto(weight), factors=factors)]
