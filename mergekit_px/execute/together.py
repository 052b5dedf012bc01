"""Several outputs from one reading: chunks of the inputs that several plans share are read and converted once.

Outputs are made side by side, tensor by tensor. What cannot be cut in the same way for all of them (methods that need
the tensor whole, or statistics of it, and adapters) is made for each output on its own, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergekit_px.execute.fused import FusedItems, write_together
from mergekit_px.execute.scheduler import Job, Routine
from mergekit_px.plan.budget import needs_whole, plan_budget, unit
from mergekit_px.plan.model import Budget, Plan, WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Leaf, Node, Read
from mergekit_px.stages import timed

if TYPE_CHECKING:
    import torch

    from mergekit_px.execute.items import Execution
    from mergekit_px.execute.lane import Lane

_PIECE = 1 << 16
"""Elements on which all outputs are made before the next: what the inputs' values occupy stays in the cache."""


@dataclass(frozen=True, eq=False)
class Output:
    """One of the outputs: what makes its items without torch, and, made when it is needed, what makes them with it."""

    plan: Plan
    fused: FusedItems
    execution: Callable[[], Execution]


@dataclass(frozen=True, eq=False)
class Member:
    """One output's part in a tensor."""

    output: Output
    item: WorkItem

    @property
    def execution(self) -> Execution:
        return self.output.execution()


def members_by_tensor(outputs: Sequence[Output]) -> list[list[Member]]:
    """For each tensor name its items of all plans, whose expressions share the leaves that they have in common."""
    groups: dict[str, list[Member]] = {}
    for output in outputs:
        for item in output.plan.items:
            groups.setdefault(item.name, []).append(Member(output, item))
    return [_sharing(group) for group in groups.values()]


def joint_budget(plans: Sequence[Plan], groups: Sequence[Sequence[Member]]) -> Budget:
    """Workers and chunk for all outputs at once. Raises ``MemoryBudgetError``."""
    options = plans[0].options
    items = [_joint_item([member.item for member in group]) for group in groups]
    return plan_budget(items, memory=options.memory, threads=options.threads, outputs=len(plans))


def covers(group: Sequence[Member]) -> bool:
    """Whether torch is not needed for a tensor of any output."""
    return all(member.output.fused.covers(member.item) for member in group)


def routine(group: Sequence[Member]) -> Routine[Any]:
    """Everything that makes a tensor of all outputs."""
    together = [member for member in group if _is_shared(member.item)]
    if len(together) < 2 or len({(unit(member.item), member.item.wide) for member in together}) > 1:
        together = []
    chunks: dict[tuple[int, int], list[Member]] = {}
    for member in together:
        for chunk in member.output.fused.left(member.item):
            chunks.setdefault(chunk, []).append(member)
    if chunks:
        yield [Job(partial(_write_chunk, members, *chunk)) for chunk, members in chunks.items()]
    for member in group:
        if member not in together:
            alone = member.output.fused if member.output.fused.covers(member.item) else member.execution
            yield from alone.routine(member.item)


def _is_shared(item: WorkItem) -> bool:
    statistics = any(node.method.statistics is not None for node in item.applied)
    apart = needs_whole(item) or statistics or item.adapted or item.encoding is not None
    return bool(item.elements) and item.action != "copy" and not apart


def _write_chunk(members: Sequence[Member], start: int, stop: int, lane: Lane | None) -> None:
    parts: list[tuple[FusedItems, WorkItem, dict[int, Any]]] = [
        (member.output.fused, member.item, {}) for member in members
    ]
    if (lane is None or lane.device.type == "cpu") and write_together(parts, start, stop):
        return
    if lane is None:
        from mergekit_px.execute.lane import Lane, pick_device

        lane = Lane(pick_device("cpu"))
    _write_by_torch(members, start, stop, lane)


def _write_by_torch(members: Sequence[Member], start: int, stop: int, lane: Lane) -> None:
    import torch

    from mergekit_px.execute.items import as_bytes

    first = members[0]
    with lane.computing():
        leaves = list(dict.fromkeys(leaf for member in members for leaf in member.item.leaves))
        raw = first.execution.read(first.item, leaves, start, stop, lane)
        hosts, stored = [], []
        for number, member in enumerate(members):
            host = lane.host_bytes(f"output {number}", (stop - start) * (member.item.dtype.bits // 8))
            hosts.append(host)
            out = host if lane.device.type == "cpu" else torch.empty_like(host, device=lane.device)
            stored.append(out.view(member.item.dtype.torch))
        piece = _piece(first.item) if lane.device.type == "cpu" else stop - start
        for begin in range(start, stop, piece):
            end = min(begin + piece, stop)
            known: dict[int, torch.Tensor] = {}
            for member, out in zip(members, stored, strict=True):
                with timed("arithmetic"):
                    value = member.execution.block(member.item, raw, start, begin, end, known).value(member.item.node)
                member.execution.store(member.item, value, out[begin - start : end - start])
        if lane.device.type != "cpu":
            for host, out in zip(hosts, stored, strict=True):
                host.copy_(out.view(torch.uint8), non_blocking=True)
        lane.finish()
    for member, host in zip(members, hosts, strict=True):
        width = member.item.dtype.bits // 8
        member.execution.sink.write(member.item.name, start * width, as_bytes(host))
        member.execution.advance(member.item.name, (stop - start) * width)


def _piece(item: WorkItem) -> int:
    """Elementwise values do not depend on the cut; rows are cut as they always are."""
    return _PIECE if item.access == "elementwise" else unit(item)


def _sharing(group: Sequence[Member]) -> list[Member]:
    known: dict[object, Node] = {}
    return [
        replace(member, item=_interned(member.item, known)) if _is_shared(member.item) else member for member in group
    ]


def _interned(item: WorkItem, known: dict[object, Node]) -> WorkItem:
    def visit(node: Node) -> Node:
        if isinstance(node, Read):
            return known.setdefault((node.input, node.tensor.name, node.shape, node.kind), node)
        if isinstance(node, Decoded):
            parts = tuple((part.input, part.tensor.name) for part in node.parts)
            return known.setdefault((node.encoding.name, parts, node.kind), node)
        if isinstance(node, Apply):
            base = None if node.base is None else visit(node.base)
            return replace(node, sources=tuple(map(visit, node.sources)), base=base)
        return node  # gathered rows and adapters are told apart by what they are

    return WorkItem(item.name, item.dtype, item.shape, visit(item.node))


def _joint_item(items: Sequence[WorkItem]) -> WorkItem:
    """What stands for all items of a tensor where memory is planned: the inputs of all, the widest output."""
    leaves: Mapping[Leaf, None] = dict.fromkeys(leaf for item in items for leaf in item.leaves)
    widest = max(items, key=lambda item: item.dtype.bits)
    node = next((item.node for item in items if isinstance(item.node, Apply)), None)
    if node is None or any(not _is_shared(item) for item in items):
        return widest
    weights = (1.0,) * len(leaves)
    return WorkItem(widest.name, widest.dtype, widest.shape, replace(node, sources=tuple(leaves), weights=weights))
