"""Which base a task vector was taken from, and whether it is added to that base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.reader import MemoryReader, open_reader
from mergekit_px.errors import PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Read
from mergekit_px.plan.options import PlanOptions

UNKNOWN_FINGERPRINT = "0" * 64
"""Stands for the fingerprint of a base that is not on this machine yet; as long as the real one."""


def _full_bases(items: Iterable[WorkItem], inputs: Mapping[str, ResolvedInput]) -> dict[str, set[str]]:
    """For each task-vector input with a recorded fingerprint, the full models that it is added to."""
    found: dict[str, set[str]] = {}
    for item in items:
        deltas = {leaf.model for leaf in item.reads if leaf.kind == "delta"}
        full = {leaf.model for leaf in item.reads if leaf.kind == "weights"}
        for name in deltas:
            if inputs[name].base_fingerprint is not None:
                found.setdefault(name, set()).update(full)
    return found


def check_base_fingerprints(
    items: Sequence[WorkItem], inputs: Mapping[str, ResolvedInput], options: PlanOptions
) -> None:
    if options.allow_base_mismatch:
        return
    for delta, bases in _full_bases(items, inputs).items():
        known = {base: local_fingerprint(inputs[base]) for base in sorted(bases)}
        prints = [value for value in known.values() if value is not None]
        if prints and len(prints) == len(known) and inputs[delta].base_fingerprint not in prints:
            raise PlanError(
                f"task vector '{delta}' was taken from another base than {', '.join(repr(base) for base in known)}",
                where=inputs[delta].reference,
                hint="give the base that it was subtracted from, or --allow-base-mismatch",
            )


def local_fingerprint(source: ResolvedInput) -> str | None:
    """The fingerprint of an input that is on this machine; None for one that is not."""
    if source.state is not None:
        return fingerprint(source.checkpoint, MemoryReader(source.state))
    if source.checkpoint.directory is None:
        return None
    reader = open_reader(source.checkpoint)
    try:
        return fingerprint(source.checkpoint, reader)
    finally:
        reader.close()


def base_fingerprint(items: Iterable[WorkItem], inputs: Mapping[str, ResolvedInput]) -> str | None:
    """The fingerprint that a task vector is bound to: of its one base, or the one that its sources share."""
    subtracted: set[str] = set()
    recorded: set[str | None] = set()
    for item in items:
        for node in item.applied:
            if node.kind == "delta" and node.method.signed:
                for source, weight in zip(node.sources, node.weights, strict=True):
                    if isinstance(source, Read) and source.kind == "weights" and weight < 0:
                        subtracted.add(source.input)
        recorded.update(inputs[leaf.model].base_fingerprint for leaf in item.reads if leaf.kind == "delta")
    if len(subtracted) == 1 and not recorded:
        return local_fingerprint(inputs[subtracted.pop()]) or UNKNOWN_FINGERPRINT
    return recorded.pop() if len(recorded) == 1 and not subtracted else None
