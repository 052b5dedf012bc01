"""A plan as plain data, for ``pxmerge plan`` and its ``--json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from mergekit_px.checkpoint.destination import destination
from mergekit_px.checkpoint.side_files import is_tokenizer_file
from mergekit_px.declare.document import Document
from mergekit_px.plan.fingerprints import local_fingerprint
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Plan
from mergekit_px.plan.schedule import SchedulePlan

_NAMED = 50


class InputPlan(Document):
    """An input of a merge."""

    reference: str
    commit: str | None
    local: bool
    kind: Literal["model", "task vector"]
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    architecture: str | None
    fingerprint: str | None


class ArtefactPlan(Document):
    """A small file that a parameter names."""

    kind: str
    bytes: int
    sha256: str


class DroppedPlan(Document):
    """A tensor of an input that is not in the output."""

    input: str
    tensor: str
    reason: str


class TensorPlan(Document):
    """How many tensors become what; ``in_some_inputs``: input -> tensors of the output that it lacks, the first 50."""

    output: int
    merged: int
    copied: int
    converted: int
    in_all_inputs: int
    in_some_inputs: dict[str, list[str]]
    by_method: dict[str, int]
    dropped: list[DroppedPlan]


class ShardPlan(Document):
    """A file of weights."""

    file: str
    bytes: int


class OutputPlan(Document):
    """What is written, and where."""

    path: str | None
    one_file: bool
    shards: list[ShardPlan]
    bytes: int


class MemoryPlan(Document):
    """Peak memory, and what it is made of."""

    peak_bytes: int
    baseline_bytes: int
    workers: int
    bytes_per_worker: int
    largest_bytes: int
    largest_tensor: str | None
    chunk_elements: int


class PlanDocument(Document):
    """Everything that a plan decided. ``steps`` are those of the recipe; ``seconds_bound`` is the least time,
    ``schedules`` are those of several workers where they were asked for."""

    plan_hash: str
    kind: Literal["model", "task vector"]
    inputs: dict[str, InputPlan]
    artefacts: dict[str, ArtefactPlan]
    steps: dict[str, dict[str, Any]]
    tensors: TensorPlan
    parameters: int
    dtypes: dict[str, int]
    tied_embeddings: bool | None
    config_from: str | None
    tokenizer_from: str | None
    side_files: dict[str, str]
    left_behind: dict[str, str]
    output: OutputPlan
    memory: MemoryPlan
    bytes_read: int
    bytes_written: int
    seconds_bound: float | None
    schedules: list[SchedulePlan]
    seed: int
    notes: list[str]


def plan_report(
    plan: Plan, *, seconds_bound: float | None = None, schedules: Sequence[SchedulePlan] = ()
) -> dict[str, Any]:
    """Everything that a plan decided, JSON-able.

    Args:
        seconds_bound: the least time for the bytes moved on this machine, where it was measured.
        schedules: of the work over several workers.
    """
    names = {name: set(source.checkpoint.tensors) for name, source in plan.inputs.items()}
    outputs = {item.name for item in plan.items}
    everywhere = set.intersection(*names.values()) if names else set()
    actions = Counter(item.action for item in plan.items)
    methods = Counter(node.method.name for item in plan.items for node in item.applied)
    return {
        "plan_hash": plan.hash,
        "kind": "task vector" if plan.kind == "delta" else "model",
        "inputs": {name: _input(source, plan) for name, source in plan.inputs.items()},
        "artefacts": {
            artefact.reference: {"kind": artefact.kind, "bytes": artefact.size, "sha256": artefact.sha256}
            for artefact in plan.artefacts
        },
        "steps": dict(plan.steps),
        "tensors": {
            "output": len(plan.items),
            "merged": actions["merge"],
            "copied": actions["copy"],
            "converted": actions["convert"],
            "in_all_inputs": len(everywhere),
            "in_some_inputs": {
                name: sorted(outputs - found)[:_NAMED] for name, found in names.items() if outputs - found
            },
            "by_method": dict(methods),
            "dropped": [{"input": drop.input, "tensor": drop.tensor, "reason": drop.reason} for drop in plan.dropped],
        },
        "parameters": sum(item.elements for item in plan.items),
        "dtypes": dict(Counter(item.dtype.name for item in plan.items)),
        "tied_embeddings": _tied(plan),
        "config_from": plan.config_from,
        "tokenizer_from": plan.tokenizer_from if any(map(is_tokenizer_file, plan.side_files)) else None,
        "side_files": dict(plan.side_files),
        "left_behind": dict(plan.left_behind),
        "output": {
            "path": plan.store or (str(plan.output) if plan.output is not None else None),
            "one_file": plan.output is not None and destination(plan.output).file is not None,
            "shards": [{"file": shard.file, "bytes": shard.size} for shard in plan.layout.shards],
            "bytes": plan.bytes_written,
        },
        "memory": {
            "peak_bytes": plan.budget.total,
            "baseline_bytes": plan.budget.baseline,
            "workers": plan.budget.workers,
            "bytes_per_worker": plan.budget.worker,
            "largest_bytes": plan.budget.largest,
            "largest_tensor": plan.budget.largest_tensor,
            "chunk_elements": plan.budget.chunk,
        },
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "seconds_bound": seconds_bound,
        "schedules": [schedule.model_dump() for schedule in schedules],
        "seed": plan.seed,
        "notes": list(plan.notes),
    }


def _input(source: ResolvedInput, plan: Plan) -> dict[str, Any]:
    checkpoint = source.checkpoint
    return {
        "reference": source.reference,
        "commit": source.repo.commit if source.repo is not None else None,
        "local": checkpoint.directory is not None,
        "kind": "task vector" if source.is_task_vector else "model",
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.elements for tensor in checkpoint.tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in checkpoint.tensors.values())),
        "architecture": ((source.config or {}).get("architectures") or [None])[0],
        "fingerprint": local_fingerprint(source) if plan.kind == "delta" else None,
    }


def _tied(plan: Plan) -> bool | None:
    if plan.config is None:
        return None
    value = plan.config.get("tie_word_embeddings")
    return bool(value) if value is not None else None
