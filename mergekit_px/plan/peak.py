"""The memory that a plan may take at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """Peak memory, in bytes, as planned.

    ``total = baseline + workers * worker + side_by_side * largest``: the interpreter with its libraries, the buffers
    of each worker, and the largest tensor that a method needs whole, as often as such are worked on at once.
    """

    baseline: int
    workers: int
    worker: int
    largest: int
    largest_tensor: str | None
    chunk: int
    """Elements of a tensor that one worker holds at a time."""
    side_by_side: int = 1
    """How many tensors as large as the largest fit at once."""

    @property
    def total(self) -> int:
        return self.baseline + self.workers * self.worker + self.whole

    @property
    def whole(self) -> int:
        """What tensors that are needed whole may occupy together."""
        return self.side_by_side * self.largest
