"""Pools of components as folders: made from a plan, or grown from an older pool.

``components.safetensors`` holds ``NAME.U`` (m, k), ``NAME.S`` (k) and ``NAME.V`` (n, k) for each tensor that is merged
as a matrix (rows of n elements), the same with an axis before for a stack of matrices, and ``NAME.delta`` for each that
is averaged, all float32; ``pool.json`` beside it says whose components they are. A pool that has room for more
components than there are ends in zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputTensor, parse_size, plan_layout
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import BASE_KEY, COMPONENTS_KIND, KIND_KEY
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import InputError, PlanError, UsageError
from mergekit_px.execute.items import as_bytes
from mergekit_px.kernels.pool import ComponentPool
from mergekit_px.methods.svd import SvdParams
from mergekit_px.plan.model import Plan
from mergekit_px.pools.deltas import DeltaReader, Merge, base_print, merges_of, open_deltas, single_base
from mergekit_px.pools.parts import Part, factor_shapes, parts_of
from mergekit_px.pools.record import RECORD_FILE, PartRecord, PoolRecord, TensorRecord, read_record

STEM = "components"

Advance = Callable[[int, int], None]
"""Told of bytes done and bytes in all, as one source has them."""


def write_components(
    plan: Plan, sources: Sequence[str], *, into: Path | None = None, advance: Advance = lambda done, total: None
) -> list[str]:
    """Write the pool of a plan's sources, or an older pool with these sources added, into the plan's output folder.

    One tensor of one source is held at a time, with the base's and the components that are kept. A pool that sources
    were added to is the one that all of them would have given at once.

    Args:
        plan: of one svd step, its inputs on this machine.
        sources: references of the sources, to be recorded.
        into: the older pool; may be the output folder itself, which is then replaced at the end.

    Returns:
        what should be said: failed drivers and what served instead.

    Raises:
        UsageError, PlanError: settings that components cannot have, another base or other settings than the pool's.
        InputError: an older pool that cannot be read.
        NonFiniteError, WriteError: as a merge.
    """
    if plan.output is None:
        raise UsageError("components need an output folder")
    merges = merges_of(plan)
    _check(merges)
    older = None if into is None else _Older(into, plan, merges)
    known = [] if older is None else older.record.sources
    if again := [source for source in sources if source in known]:
        raise UsageError(f"the pool holds {shown(again[0])} already", where=str(into), hint="give other sources")
    if older is not None:
        merges += older.untouched(plan, merges)
    total = len(known) + len(sources)
    parts = {one.name: parts_of(one.item.shape, one.name, one.params, total) for one in merges}
    settings = merges[0].params.model_dump(mode="json")
    base = single_base(plan)
    print_of_base = base_print(plan)
    metadata = {
        KIND_KEY: COMPONENTS_KIND,
        "top_k": str(settings["top_k"]),
        "pool": str(settings["pool"]),
        "sources": json.dumps([*known, *sources]),
    }
    if print_of_base is not None:
        metadata[BASE_KEY] = print_of_base
    layout = plan_layout(
        [tensor for one in merges for tensor in _planned(one, parts[one.name])],
        shard_size=parse_size(plan.options.shard_size or plan.loaded.recipe.output.shard_size),
        stems={"": STEM},
        metadata=metadata,
    )
    tensors: dict[str, TensorRecord] = {}
    notes: list[str] = []
    done = 0
    identity = hashlib.sha256(plan.hash.encode() + (b"" if older is None else older.record.encoded())).hexdigest()
    with open_deltas(plan) as reader, CheckpointWriter(plan.output, layout, identity, mode=plan.options.mode) as writer:
        for one in merges:
            own = one.params.model_dump(mode="json")
            pools: list[ComponentPool] = []
            if parts[one.name]:
                pools = _started(parts[one.name], one, len(known), older, reader.device)
                _fill(pools, parts[one.name], one, reader, len(sources))
                found = _factors(pools, parts[one.name], one)
            else:
                past = None if older is None else older.delta(one, reader.device)
                found = {"delta": _mean(one, reader, len(known), len(sources), past)}
            for suffix, tensor in found.items():
                host = tensor.float().cpu().contiguous().reshape(-1).view(torch.uint8)
                writer.write(f"{one.name}.{suffix}", 0, as_bytes(host))
            notes += [f"{pool.label}: {note}" for pool in pools for note in pool.notes]
            tensors[one.name] = TensorRecord(
                parts=[_record(pool) for pool in pools], settings=None if own == settings else own
            )
            done += one.nbytes
            advance(done, sum(each.nbytes for each in merges))
        record = PoolRecord(
            sources=[*known, *sources],
            base=None if base is None else plan.inputs[base].reference,
            base_fingerprint=print_of_base,
            settings=settings,
            tensors=tensors,
        )
        # The file is closed before it may be replaced by the new one.
        if older is not None:
            older.close()
        writer.publish({RECORD_FILE: record.encoded()})
    return notes


def _check(merges: Sequence[Merge]) -> None:
    for one in merges:
        if one.params.calibrate != "none":
            raise UsageError("--calibrate goes with a checkpoint: it changes the sum, which components are not")
        if one.params.recover is not None:
            raise UsageError("--recover goes with a checkpoint: its scale is that of the sum, not of one component")
        if one.params.scale == 0:
            raise UsageError("components of scale 0 would all be zero", where=shown(one.name))


def _planned(one: Merge, parts: Sequence[Part]) -> list[OutputTensor]:
    single = parse_dtype("F32")
    shapes = factor_shapes(one.item.shape, parts) if parts else {"delta": one.item.shape}
    return [OutputTensor(f"{one.name}.{suffix}", single, shape) for suffix, shape in shapes.items()]


def _started(
    parts: Sequence[Part], one: Merge, known: int, older: _Older | None, device: torch.device
) -> list[ComponentPool]:
    """The pools before the new sources are added; sources that left a tensor as it is have no components there."""
    if older is not None and one.name in older.record.tensors:
        return older.pools(one, device)
    return [ComponentPool(part.limit, one.params.pool, part.label, energies=[0.0] * known) for part in parts]


def _fill(pools: Sequence[ComponentPool], parts: Sequence[Part], one: Merge, reader: DeltaReader, sources: int) -> None:
    if one.node is None:
        for pool in pools:
            pool.energies += [0.0] * sources
        return
    operands = reader.operands(one.node, one.item)
    for source, weight in enumerate(operands.weights):
        factored = reader.factored(one.node, source) if len(parts) == 1 and parts[0].place is None else None
        if factored is not None:
            pools[0].add(factored, weight)
            continue
        delta = operands.tensors[source]
        for pool, part in zip(pools, parts, strict=True):
            pool.add(part.rows(delta), weight)


def _factors(pools: Sequence[ComponentPool], parts: Sequence[Part], one: Merge) -> dict[str, Tensor]:
    """``U``, ``S`` and ``V`` of all parts side by side."""
    u, s, v = (pools[0].s.new_zeros(shape) for shape in factor_shapes(one.item.shape, parts).values())
    for pool, part in zip(pools, parts, strict=True):
        left, right = pool.u, pool.v
        if one.params.orthogonalise and len(pool.s):
            merged = pool.orthogonalised()
            left, right = merged.left / pool.s, merged.right
        part.of(u)[part.top : part.bottom, part.held(len(pool.s))] = left
        part.of(s)[part.held(len(pool.s))] = pool.s * one.params.scale
        part.of(v)[:, part.held(len(pool.s))] = right
    return {"U": u, "S": s, "V": v}


def _mean(one: Merge, reader: DeltaReader, known: int, sources: int, older: Tensor | None) -> Tensor:
    """The mean over all sources, ``known`` of which are in the older mean."""
    total: Tensor | None = None if older is None else older * (known / one.params.scale)
    if one.node is not None:
        operands = reader.operands(one.node, one.item)
        for delta, weight in zip(operands.tensors, operands.weights, strict=True):
            total = delta * weight if total is None else total + delta * weight
    assert total is not None
    return total * (one.params.scale / (known + sources))


def _record(pool: ComponentPool) -> PartRecord:
    state = pool.state()
    return PartRecord(source=state["source"].tolist(), order=state["order"].tolist(), energies=pool.energies)


class _Older:
    """A pool on disk that sources are added to."""

    def __init__(self, folder: Path, plan: Plan, merges: Sequence[Merge]) -> None:
        self.folder = folder
        self.record = read_record(folder)
        self._check_base(plan)
        self._check_tensors(merges)
        self._checkpoint = open_checkpoint(folder)
        self._reader = open_reader(self._checkpoint)
        if self._checkpoint.metadata.get("sources") != json.dumps(self.record.sources):
            raise InputError("components and pool.json are not of the same pool", where=str(folder))

    def close(self) -> None:
        self._reader.close()

    def untouched(self, plan: Plan, merges: Sequence[Merge]) -> list[Merge]:
        """The tensors of the pool that the new sources leave as the base has them."""
        merged = {one.name for one in merges}
        items = {item.name: item for item in plan.items}
        left = [name for name in self.record.tensors if name not in merged]
        if missing := [name for name in left if name not in items]:
            raise PlanError(f"the sources do not have {shown(missing[0])}", where=str(self.folder))
        return [Merge(items[name], None, SvdParams(**self.record.settings_of(name))) for name in left]

    def pools(self, one: Merge, device: torch.device) -> list[ComponentPool]:
        """The pools of a tensor's parts as they were, their singular values without the scale."""
        known = parts_of(one.item.shape, one.name, one.params, len(self.record.sources))
        u, s, v = (self._load(f"{one.name}.{part}").to(device) for part in "USV")
        s = s / one.params.scale
        pools: list[ComponentPool] = []
        for part, kept in zip(known, self.record.tensors[one.name].parts, strict=True):
            shapes = factor_shapes(one.item.shape, known)
            if (u.shape, s.shape, v.shape) != tuple(shapes.values()) or len(kept.source) > part.width:
                raise InputError(f"the components of {shown(one.name)} do not fit it", where=str(self.folder))
            held = part.held(len(kept.source))
            state = {
                "u": part.of(u)[part.top : part.bottom, held],
                "s": part.of(s)[held],
                "v": part.of(v)[:, held],
                "source": torch.tensor(kept.source, dtype=torch.int64),
                "order": torch.tensor(kept.order, dtype=torch.int64),
                "energies": torch.tensor(kept.energies, dtype=torch.float64),
            }
            pools.append(ComponentPool.from_state(state, part.limit, one.params.pool, part.label))
        return pools

    def delta(self, one: Merge, device: torch.device) -> Tensor | None:
        """The older mean of a tensor that is averaged; None if no source had changed it."""
        if one.name not in self.record.tensors:
            return None
        return self._load(f"{one.name}.delta").to(device)

    def _load(self, name: str) -> Tensor:
        stored = self._checkpoint.tensors.get(name)
        if stored is None:
            raise InputError(f"{shown(name)} is missing", where=str(self.folder))
        return read_tensor(self._reader, stored)

    def _check_base(self, plan: Plan) -> None:
        found, wanted = base_print(plan), self.record.base_fingerprint
        if plan.options.allow_base_mismatch:
            return
        if wanted is None:
            raise PlanError(
                "the pool's base is not known (the mean of its sources, or task vectors of no recorded base)",
                where=str(self.folder),
                hint="make the pool with --base, or pass --allow-base-mismatch",
            )
        if found != wanted:
            raise PlanError(
                "the sources' base is not the one that the pool was taken from",
                where=str(self.folder),
                hint=f"give --base {self.record.base}" if self.record.base else "give the same base",
            )

    def _check_tensors(self, merges: Sequence[Merge]) -> None:
        for one in merges:
            name = one.name if one.name in self.record.tensors else None
            settings = self.record.settings if name is None else self.record.settings_of(name)
            _check_settings(settings, one.params.model_dump(mode="json"), str(self.folder))
            if one.params.orthogonalise:
                raise UsageError(
                    "the pool's vectors were orthogonalised, so its components are not there any more",
                    where=str(self.folder),
                    hint="make the pool with --no-orthogonalise to add to it",
                )


def _check_settings(pool: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    for key, value in asked.items():
        if pool.get(key) != value:
            flag = f"--{key.replace('_', '-')}"
            raise PlanError(f"the pool was made with {flag} {pool.get(key)}, not {value}", where=where)
