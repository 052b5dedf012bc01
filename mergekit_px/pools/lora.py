"""The components of many sources as one adapter of rank K."""

from __future__ import annotations

import glob
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_px.adapters.extract import ExtractOptions, extract_adapter
from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.errors import PlanError, UsageError
from mergekit_px.plan.model import Plan
from mergekit_px.plan.nodes import Apply
from mergekit_px.pools.deltas import Merge, merges_of, open_deltas, single_base
from mergekit_px.pools.parts import parts_of

if TYPE_CHECKING:
    import torch


def write_lora(plan: Plan, advance: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Write the merge as a PEFT folder: the K components of each matrix as factors, vectors that changed whole.

    Embeddings and heads that are averaged have no low rank and are left out.

    Args:
        plan: of one svd step on a base, its inputs on this machine.
        advance: told of bytes done and bytes in all, as one source has them.

    Returns:
        what should be said: tensors left out.

    Raises:
        PlanError: there is no single base.
        UsageError: matrices that are cut, which no adapter of rank K is.
        OutputError: the folder is not empty.
    """
    if plan.output is None:
        raise UsageError("an adapter needs an output folder")
    if plan.options.mode == "resume":
        raise UsageError("an adapter is written at once", hint="--overwrite instead of --resume")
    base = single_base(plan)
    merges = {one.name: one for one in merges_of(plan)}
    if base is None:
        raise PlanError("an adapter is of one base, and the sources have none", hint="give it with --base")
    checkpoint = plan.inputs[base].checkpoint
    ranks = {name: 0 for name, tensor in checkpoint.tensors.items() if len(tensor.shape) >= 2}
    for one in merges.values():
        parts = parts_of(one.item.shape, one.name, one.params, _source_count(one))
        if any(part.place is not None for part in parts):
            what = "an adapter of rank K has no stack of matrices"
            raise UsageError(what, where=one.name, hint="write a checkpoint or components")
        if len(parts) > 1:
            raise UsageError("an adapter of rank K has no matrices in parts", where=one.name, hint="--split 1")
        if parts:
            ranks[one.name] = min(parts[0].limit, *_sides(one))
    options = ExtractOptions(rank={"*": 1} | {glob.escape(name): rank for name, rank in ranks.items()})
    done, total = 0, sum(one.nbytes for one in merges.values())
    with open_deltas(plan) as deltas, closing(open_reader(checkpoint)) as reader:

        def merged(tensor: StoredTensor) -> torch.Tensor:
            """The base with the merged update, in float64 so that the update can be taken off again."""
            nonlocal done
            value, one = read_tensor(reader, tensor), merges.get(tensor.name)
            if one is None or not isinstance(one.node, Apply):
                return value
            change = one.node.method(deltas.operands(one.node, one.item))
            done += one.nbytes
            advance(done, total)
            return value.double() + change.cpu().double()

        found = extract_adapter(checkpoint, checkpoint, options, load=merged)
    reference = plan.inputs[base].reference
    whole = {name: tensor.to(checkpoint.tensors[name].dtype.torch) for name, tensor in found.whole.items()}
    replace(found, whole=whole).save(plan.output, base_model_name=reference, overwrite=plan.options.mode == "overwrite")
    if not found.dropped:
        return []
    return [
        f"{len(found.dropped)} averaged tensors have no low rank and are not in the adapter: "
        f"{', '.join(found.dropped[:4])}{', ...' if len(found.dropped) > 4 else ''}"
    ]


def _source_count(one: Merge) -> int:
    return len(one.node.sources) if one.node is not None else 0


def _sides(one: Merge) -> tuple[int, int]:
    rows = one.item.shape[0]
    return rows, one.item.elements // rows
