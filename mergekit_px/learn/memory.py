"""What a learner will keep in memory, by the headers of its inputs, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.errors import MemoryBudgetError
from mergekit_px.learn.life import Run

_LIBRARIES = 500_000_000
"""Of the process: the interpreter with torch and transformers."""
COMPUTED = 4
"""Bytes of a number that is learned, summed up or computed with."""
_COPIES = 3
"""Of the largest tensor that are there at once: made anew, a part of its update, its gradient."""


def floating(checkpoint: Checkpoint) -> list[StoredTensor]:
    """The tensors that are computed with."""
    return [stored for stored in checkpoint.tensors.values() if stored.dtype.arithmetic]


def numbers(tensors: Iterable[StoredTensor]) -> int:
    """How many numbers tensors hold together."""
    return sum(math.prod(stored.shape) for stored in tensors)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Of the tensors that are computed with."""
    return sum(stored.nbytes for stored in floating(checkpoint))


def is_narrow(checkpoint: Checkpoint) -> bool:
    """Whether all of it is stored alike in 16 bits, so that it can be kept so."""
    dtypes = {stored.dtype for stored in floating(checkpoint)}
    return len(dtypes) == 1 and next(iter(dtypes)).bits == 16


def narrow_bytes(checkpoint: Checkpoint) -> int:
    """Of a model that is kept as it is stored where that is narrow."""
    return stored_bytes(checkpoint) if is_narrow(checkpoint) else COMPUTED * numbers(floating(checkpoint))


def plan_memory(
    run: Run[Any], tensors: Sequence[StoredTensor], kept: Mapping[str, int], ways: Mapping[str, bool]
) -> None:
    """Where there is a budget, say what will be kept, or refuse.

    Args:
        tensors: of the models, whose parameters count; none where there is no model.
        kept: bytes, by what they are for.
        ways: what needs less -> whether that is left to do.

    Raises:
        MemoryBudgetError: more than ``--memory``.
    """
    parameters = max(numbers(tensors), 1)
    largest = max((math.prod(stored.shape) for stored in tensors), default=0)
    kept = {**kept, "one layer": _COPIES * COMPUTED * largest}
    total = _LIBRARIES + sum(kept.values())
    said = ", ".join(f"{name} {size / parameters:.1f}" for name, size in kept.items() if size)
    each = f", {sum(kept.values()) / parameters:.1f} bytes a parameter ({said})" if tensors else ""
    if run.settings.memory is None:
        return
    budget = parse_size(run.settings.memory, "--memory")
    if total > budget:
        less = [way for way, left in ways.items() if left]
        raise MemoryBudgetError(
            f"it needs {total / 1e6:.0f} MB besides activations{each}, and the budget is {budget / 1e6:g} MB",
            hint=f"{', or '.join([*less, ''])}raise --memory",
        )
    run.note(f"memory: {total / 1e6:.0f} MB besides activations{each}")
