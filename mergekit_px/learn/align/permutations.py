"""Permutations of the axes of tensors, and the file that holds them.

``rebasin.safetensors`` holds, for each permuted axis of each tensor, ``NAME.axisN``: int64 positions, so that position
``i`` of the result is position ``order[i]`` of the original. Nothing else is needed to apply them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_px.learn.align.parts import Layout

Units = Mapping[str, Tensor]
"""The key of some units -> which unit of the source stands at each place in the target."""

Orders = dict[tuple[str, int], Tensor]
"""Tensor and axis -> positions."""


class Permutations:
    """What is done to a task vector: each axis in another order.

    Attributes:
        orders: int64, by tensor and axis.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._axes: dict[str, dict[int, Tensor]] = {}
        for (name, axis), order in orders.items():
            self._axes.setdefault(name, {})[axis] = order

    @classmethod
    def of_units(cls, layout: Layout, shapes: Mapping[str, tuple[int, ...]], units: Units) -> Permutations:
        """What an order of the units makes of the axes that they lie on."""
        orders: Orders = {}
        for key, part in layout.parts():
            place = (part.tensor, part.axis)
            order = orders.setdefault(place, torch.arange(shapes[part.tensor][part.axis]))
            order[part.rows] = part.rows[units[key]]
        return cls(orders)

    def permute(self, name: str, tensor: Tensor, *, but: int | None = None) -> Tensor:
        """A tensor with its axes permuted, except one."""
        for axis, order in self._axes.get(name, {}).items():
            if axis != but:
                tensor = tensor.index_select(axis, order.to(tensor.device))
        return tensor

    def transport(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task vector with all axes permuted; tensors that no permutation concerns are as they were."""
        return {name: self.permute(name, delta) for name, delta in deltas.items()}

    def moved(self) -> float:
        """Share of all positions that hold another one."""
        moved = sum(int((order != torch.arange(len(order))).sum()) for order in self.orders.values())
        return moved / max(1, sum(len(order) for order in self.orders.values()))

    def arrays(self) -> dict[str, Tensor]:
        """As they are written to a file."""
        return {f"{name}.axis{axis}": order for (name, axis), order in self.orders.items()}


def identity_units(layout: Layout) -> dict[str, Tensor]:
    """Every unit where it is."""
    return {key: torch.arange(len(part.rows)) for key, part in layout.parts()}
