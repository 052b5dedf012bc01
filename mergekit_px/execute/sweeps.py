"""Statistics of methods: the totals of sweeps, and the generators that ask for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_px.methods.declare import Extent, Sweep
from mergekit_px.plan.nodes import Apply

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class Totals:
    """Sums of partial results in an order that does not depend on who finished first.

    Integers are added at once, since their sum is the same in any order; floats are kept by block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._integers: NDArray[np.integer[Any]] | None = None
        # As lists: small tensors that stay between the large ones of a worker would keep its heap from shrinking.
        self._floats: dict[tuple[int, int], Any] = {}

    def add(self, order: tuple[int, int], partial_sum: torch.Tensor | NDArray[Any]) -> None:
        on_host = partial_sum if isinstance(partial_sum, np.ndarray) else partial_sum.cpu().numpy()
        with self._lock:
            if on_host.dtype.kind == "f":
                self._floats[order] = on_host.tolist()
            elif self._integers is None:
                self._integers = on_host.copy()
            else:
                self._integers += on_host

    def join(self, others: Totals) -> None:
        """Take in what was summed elsewhere."""
        self._floats.update(others._floats)
        if others._integers is not None:
            self.add((0, 0), others._integers)

    def __getstate__(self) -> tuple[Any, dict[tuple[int, int], Any]]:
        return self._integers, self._floats

    def __setstate__(self, state: tuple[Any, dict[tuple[int, int], Any]]) -> None:
        self.__init__()  # type: ignore[misc]
        self._integers, self._floats = state

    def array(self) -> NDArray[Any]:
        if not self._floats:
            return self._integers if self._integers is not None else np.zeros((), dtype=np.int64)
        parts = iter(sorted(self._floats.items()))
        result = np.array(next(parts)[1], dtype=np.float64)
        for _, part in parts:
            result += np.array(part, dtype=np.float64)
        return result

    def total(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array())


def statistics_generator(node: Apply, elements: int) -> Any:
    assert node.method.statistics is not None
    return node.method.statistics(Extent(len(node.sources), elements, node.weights, node.params))


def driven(node: Apply, elements: int, total_of: Callable[[Sweep], torch.Tensor]) -> Any:
    """A method's statistics where each sweep's total is at hand at once."""
    generator = statistics_generator(node, elements)
    total = None
    try:
        while True:
            total = total_of(next(generator) if total is None else generator.send(total))
    except StopIteration as finished:
        return finished.value


def replayed(node: Apply, elements: int, totals: Sequence[torch.Tensor]) -> tuple[Sweep | None, Any]:
    """The sweep that a method asks for after those with the totals; without one, its statistics."""
    generator = statistics_generator(node, elements)
    try:
        sweep = next(generator)
        for total in totals:
            sweep = generator.send(total)
    except StopIteration as finished:
        return None, finished.value
    return sweep, None
