"""Ways to transport a task vector that are known before anything is trained on labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Transport = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Artefact:
    """A small file from which a task vector can be transported again.

    Attributes:
        file: its name.
        arrays: what it holds.
        metadata: of its header.
    """

    file: str
    arrays: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class FixedMap:
    """What is done to any task vector of the source.

    Attributes:
        transport: the differences of the source -> those for the target.
        artefact: what it was made from; None where nothing is kept.
        report: what is to be said about it.
        controls: other transports that the result is compared with, by name.
        across_shapes: whether it takes differences of other shapes than the target's too.
    """

    transport: Transport
    artefact: Artefact | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Transport] = field(default_factory=dict)
    across_shapes: bool = False

    def moved(
        self, deltas: Mapping[str, Tensor], fitting: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """What arrives of a task vector at tensors of the target's names and shapes.

        Args:
            fitting: the part of ``deltas`` that has those before.
        """
        moved = self.transport(deltas if self.across_shapes else fitting)
        return {name: one for name, one in moved.items() if shapes.get(name) == tuple(one.shape)}
