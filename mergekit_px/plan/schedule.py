"""How the work of a plan is shared out: groups of tensors that share statistics, and files among workers, with the
least time that takes by given bandwidths.

Simulated as a cluster does it: statistics over the whole model are swept first, by all workers together; then each
takes the next file as soon as it is free.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.declare.document import Document
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply

if TYPE_CHECKING:
    from mergekit_px.plan.model import Plan, WorkItem


Bound = Callable[[int, int], float]
"""Bytes read and bytes written -> the least seconds for them on one machine."""


class SchedulePlan(Document):
    """The work of a number of workers, each a machine of its own; ``bytes_read`` and ``bytes_written`` are those of
    the busiest. ``seconds``: the least time for all; ``balance``: the part of it that a worker is busy on average."""

    workers: int
    busy: int
    bytes_read: int
    bytes_written: int
    seconds: float
    balance: float


def schedules(plan: Plan, counts: Sequence[int], bound: Bound) -> list[SchedulePlan]:
    """One for each number of workers. At least one sweep is counted for each group that shares statistics."""
    read: Counter[str] = Counter()
    files = [shard.file for shard in plan.layout.shards]
    for item in plan.items:
        read[files[plan.layout.location[item.tensors[0].name][0]]] += _bytes_read(item)
    files_moved = [(read[shard.file], shard.size) for shard in plan.layout.shards]
    sweeps = [[_bytes_read(item) for item, _ in group] for group in shared_groups(plan.items)]
    return [_schedule(files_moved, sweeps, count, bound) for count in counts]


def _schedule(
    files: Sequence[tuple[int, int]], sweeps: Sequence[Sequence[int]], count: int, bound: Bound
) -> SchedulePlan:
    moved = [(0, 0)] * count
    busy = [0.0] * count
    ended = 0.0
    for sizes in sweeps:
        shares = [sum(sizes[number] for number in share) for share in evenly(sizes, count)]
        for place, share in enumerate(shares):
            moved[place] = (moved[place][0] + share, 0)
            busy[place] += bound(share, 0)
        ended += max(bound(share, 0) for share in shares)
    free = [(ended, place) for place in range(count)]
    for bytes_read, bytes_written in files:
        start, place = heapq.heappop(free)
        moved[place] = (moved[place][0] + bytes_read, moved[place][1] + bytes_written)
        busy[place] += bound(bytes_read, bytes_written)
        heapq.heappush(free, (start + bound(bytes_read, bytes_written), place))
    seconds = max(end for end, _ in free)
    busiest = max(range(count), key=busy.__getitem__)
    return SchedulePlan(
        workers=count,
        busy=sum(map(any, moved)),
        bytes_read=moved[busiest][0],
        bytes_written=moved[busiest][1],
        seconds=seconds,
        balance=sum(busy) / (count * seconds) if seconds else 1.0,
    )


def _bytes_read(item: WorkItem) -> int:
    return item.factor_bytes + sum(read.tensor.nbytes for read in item.reads)


def shared_groups(items: Sequence[WorkItem]) -> list[list[tuple[WorkItem, Apply]]]:
    """The nodes whose statistics span the model, grouped by step and parameters, inner steps first."""
    groups: dict[Any, list[tuple[WorkItem, Apply]]] = {}
    depth: dict[Any, int] = {}
    for item in items:
        for node in item.applied:
            if node.method.statistics is None or node.method.scope(node.params) != "model":
                continue
            key = (node.step, node.method.name, node.params.model_dump_json(), node.source_indices)
            groups.setdefault(key, []).append((item, node))
            depth[key] = max(depth.get(key, 0), _depth(node))
    return [groups[key] for key in sorted(groups, key=lambda key: depth[key])]


def evenly(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Things by number in so many shares of about the same size: the largest first, to where there is least."""
    shares: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    filled = [(0, place) for place in range(len(shares))]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size, place = heapq.heappop(filled)
        shares[place].append(number)
        heapq.heappush(filled, (size + sizes[number], place))
    return [sorted(share) for share in shares]


def _depth(node: Apply) -> int:
    return 1 + max((_depth(operand) for operand in node.operands if isinstance(operand, Apply)), default=0)
