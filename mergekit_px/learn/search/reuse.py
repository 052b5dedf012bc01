"""Tensors that are the same in every trial are merged once and copied from then on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.nodes import Read

_KEPT = "kept merge"


def unchanged(first: Plan, second: Plan) -> set[str]:
    """Names of the tensors that both plans compute, and compute alike.

    Statistics over the whole model depend on other tensors, so what needs them never counts.
    """
    if first.seed != second.seed:
        return set()
    alike = {item.name: _meaning(item) for item in first.items if _may_be_kept(item)}
    return {item.name for item in second.items if item.name in alike and alike[item.name] == _meaning(item)}


def with_kept(plan: Plan, names: set[str], folder: Path) -> Plan:
    """The plan with some of its tensors copied from a finished merge that made them alike."""
    kept = open_checkpoint(folder)
    items = tuple(
        replace(item, node=Read(_KEPT, kept.tensors[item.name], item.shape, item.node.kind))
        if item.name in names
        else item
        for item in plan.items
    )
    return replace(plan, lock=None, items=items, inputs={**plan.inputs, _KEPT: ResolvedInput(_KEPT, str(folder), kept)})


def _may_be_kept(item: WorkItem) -> bool:
    return item.action == "merge" and not any(
        node.method.statistics is not None and node.method.scope(node.params) == "model" for node in item.applied
    )


def _meaning(item: WorkItem) -> str:
    shapes = [read.shape for read in item.reads]  # a part of a stored tensor may be read
    indices = [node.source_indices for node in item.applied]
    return json.dumps([item.dtype.name, item.shape, item.node.describe(), shapes, indices])
