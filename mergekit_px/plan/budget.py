"""Peak memory of a plan, and how finely its tensors are cut to keep it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

from mergekit_px.checkpoint.direct import PIECE
from mergekit_px.checkpoint.held import ROOM
from mergekit_px.errors import MemoryBudgetError
from mergekit_px.plan.model import Budget, WorkItem
from mergekit_px.plan.nodes import Leaf, Read

BLOCK = 1 << 18
"""Elements on which a method computes at a time: 1 MiB of float32, so that its temporaries stay in the cache.
Statistics are summed over blocks of this size in order, so results do not depend on chunks or threads."""

DEFAULT_CHUNK = 1 << 20
"""Elements that are read and written at a time."""

_JOINT = 16 * BLOCK
"""Elements of rows that share scales and are encoded at once; of more the largest magnitudes are found first."""

BASELINE = 340_000_000
"""What the interpreter with torch occupies before the first tensor is read."""

PAST_CACHE = 2 << 30
"""Bytes of an output from which on it goes past the page cache: it would push out what is more use there, and writing
takes a third of the processor time. Smaller ones stay in the cache for whoever loads them next."""

_ACCUMULATION = 4
_ENCODING = 6
"""Copies of a block that encoding it needs: magnitudes, scaled values, two choices of codes."""


def row_length(item: WorkItem) -> int:
    """Elements of one row: the last axis."""
    return max(1, item.shape[-1]) if item.shape else 1


def unit(item: WorkItem) -> int:
    """Elements of the smallest piece into which an item may be cut: whole rows of the first axis for adapters
    and views, vectors along the last axis for methods on rows, else a block."""
    if item.access != "rows":
        return BLOCK
    row = max(1, math.prod(item.shape[1:])) if item.adapted or item.views or item.encoding else row_length(item)
    joint = 1 if item.encoding is None or ranged(item) else item.encoding.joint_rows
    return row * joint * max(1, BLOCK // (row * joint))


def ranged(item: WorkItem) -> bool:
    """Whether the scales of an encoded item are over so many rows that its largest magnitudes are swept first."""
    joint = 1 if item.encoding is None else item.encoding.joint_rows
    return joint > 1 and joint * math.prod(item.shape[1:]) > _JOINT


def _stored_bytes(item: WorkItem, outputs: int) -> float:
    """Bytes of an element in all buffers of a chunk: every input and the outputs."""
    return sum(_leaf_bits(leaf) for leaf in item.leaves) / 8 + outputs * item.dtype.bits / 8


def _leaf_bits(leaf: Leaf) -> int:
    """Bits of an element of a leaf: as stored; of a view its value, what it is made of and one temporary."""
    return leaf.dtype.bits if isinstance(leaf, Read) else 3 * 8 * _ACCUMULATION


def _scratch(item: WorkItem) -> float:
    """Accumulation-width copies of a block that are alive at once."""
    encoding = 0 if item.encoding is None else _ENCODING
    return len(item.leaves) + sum(len(node.sources) + node.method.scratch for node in item.applied) + 1 + encoding


def _width(item: WorkItem) -> int:
    return 2 * _ACCUMULATION if item.wide else _ACCUMULATION


def chunk_bytes(item: WorkItem, chunk: int, outputs: int = 1) -> int:
    """Memory that one worker needs for an item cut at ``chunk`` elements."""
    piece = unit(item)
    held = min(max(chunk // piece, 1) * piece, max(item.elements, 1))
    factors = 3 * item.factor_bytes
    block = min(piece, max(item.elements, 1)) * (_scratch(item) + outputs - 1) * _width(item)
    return int(factors + held * _stored_bytes(item, outputs) + block)


def needs_whole(item: WorkItem) -> bool:
    """Whether an item cannot be cut. What a spectral method averages, embeddings above all, can be, unless statistics
    of another size are read with it."""
    if item.access != "tensor" or item.adapted or any(view.access == "tensor" for view in item.views):
        return item.access == "tensor"
    whole = [node for node in item.applied if node.access == "tensor"]
    alike = all(math.prod(leaf.shape) == item.elements for leaf in item.leaves)
    finer = alike and all(node.access != "rows" for node in item.applied)
    return not (finer and all(node.params.treats_by_element(item.shape, item.name) for node in whole))


def whole_bytes(item: WorkItem) -> int:
    """Memory of an item whose method needs the tensor whole: base, one source at a time, scratch, result."""
    scratch = [node.method.scratch for node in item.applied]
    scratch += [node.patch.scratch for node in item.adapted if node.patch is not None]
    copies = 3 + max(scratch, default=0) + (0 if item.encoding is None else _ENCODING)
    stored = max((_leaf_bits(leaf) for leaf in item.leaves), default=32) / 8
    elements = max([item.elements, *(math.prod(leaf.shape) for leaf in item.leaves)])  # statistics may be larger
    return int(elements * (copies * _width(item) + stored) + 3 * item.factor_bytes)


def plan_budget(items: Sequence[WorkItem], *, memory: int | None, threads: int | None, outputs: int = 1) -> Budget:
    """Choose workers and chunk size.

    Args:
        outputs: how many are made of each item at once.
        memory: peak of the whole process in bytes; None to use what runs fastest.
        threads: number of workers; None for one per core.

    Raises:
        MemoryBudgetError: the budget cannot be met; names the tensor and the need.
    """
    whole = [item for item in items if item.action == "merge" and needs_whole(item)]
    cut = [item for item in items if not (item.action == "merge" and needs_whole(item))]
    workers, beside = threads or available_cores(), 0
    past_cache = outputs * sum(item.elements * item.dtype.bits // 8 for item in items) >= PAST_CACHE
    if past_cache:
        # Past the page cache each read and write is waited for, so others go on meanwhile.
        workers = threads or (1 if whole else 2) * workers
        beside = 2 * ROOM + (workers + 4) * PIECE
    largest_item = max(whole, key=whole_bytes, default=None)
    largest = whole_bytes(largest_item) if largest_item is not None else 0
    chunk = DEFAULT_CHUNK
    while True:
        worst = max(cut, key=lambda item: chunk_bytes(item, chunk, outputs), default=None)
        worker = chunk_bytes(worst, chunk, outputs) if worst is not None else 0
        budget = Budget(
            baseline=BASELINE + beside,
            workers=workers,
            worker=worker,
            largest=largest,
            largest_tensor=largest_item.name if largest_item is not None else None,
            chunk=chunk,
            past_cache=past_cache,
        )
        if memory is None:
            return replace(budget, side_by_side=max(1, min(workers, len(whole))))
        if budget.total <= memory:
            room = (memory - budget.total) // largest if largest else 0
            return replace(budget, side_by_side=max(1, min(workers, len(whole), 1 + room)))
        if chunk > BLOCK:
            chunk //= 2
        elif workers > 1:
            workers -= 1
        else:
            name = largest_item.name if largest_item is not None and largest > worker else (worst.name if worst else "")
            what = f"'{name}' needs {budget.total / 1e6:.0f} MB in all"
            if memory < BASELINE:
                what = f"the program itself needs {BASELINE / 1e6:.0f} MB before any tensor is read"
            raise MemoryBudgetError(
                f"{what}, and the budget is {memory / 1e6:g} MB",
                hint=f"raise --memory to {budget.total / 1e6 + 1:.0f}MB",
            )


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return os.cpu_count() or 1
