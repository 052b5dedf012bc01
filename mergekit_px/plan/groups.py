"""Which tensors share the statistics of a method, and how such work is shared out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply


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
