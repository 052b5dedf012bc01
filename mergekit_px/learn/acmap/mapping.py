"""A task's prototypes into the state, and the translations of all before it (section 3 of arXiv 2412.18219).

Finished passes of a mapping that was interrupted are beside the state: NAME.pending.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px._version import __version__
from mergekit_px.adapters.acmap_file import locked
from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors, write_tensors
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.acmap.arrays import ArrayFile
from mergekit_px.learn.acmap.backbone import ModelOptions
from mergekit_px.learn.acmap.export import write_prototypes
from mergekit_px.learn.acmap.prototypes import Prototypes
from mergekit_px.learn.acmap.sources import (
    ClassMeans,
    FeatureSource,
    Sources,
    Tell,
    class_means,
    labels_of,
    require_comparable,
)
from mergekit_px.learn.data import LABELS
from mergekit_px.learn.data_files import data_sha256, needs_model
from mergekit_px.learn.output import write_json


@dataclass(frozen=True, slots=True)
class MapOptions:
    """One task, and where its features come from.

    Attributes:
        state: the file that `pxmerge acmap merge` keeps.
        features: a file of features; or ``data``: a file of inputs for ``model``.
        task: its number from 1; None for the one that this file was mapped as, else the next.
        classes: those that the task has; None for those that its labels have.
        oracle: files like ``features`` (or ``data``) with examples of earlier tasks.
        concatenate: keep the features without an adapter too.
        resume: take up the finished passes of an interrupted run.
        output: the file of prototypes; a report goes beside it.
    """

    state: Path
    features: str | None = None
    data: str | None = None
    task: int | None = None
    classes: tuple[int, ...] | None = None
    oracle: tuple[str, ...] = ()
    concatenate: bool = False
    model: ModelOptions = field(default_factory=ModelOptions)
    resume: bool = False
    output: Path | None = None


def map_task(options: MapOptions, tell: Tell = lambda what, done, total: None) -> dict[str, Any]:
    """Add a task's prototypes to the state, unless they are there, and write the table if an output is named.

    ``p_c^(t)`` is the mean of ``f(x; A_t)`` over the examples of class c, with A_t the merged adapter of the first
    t tasks (of the first L, for later ones). For every task i < t <= L,
    ``Delta_{i,t} = mu(A_t) - mu(A_i)``, where mu is the mean of the class means of task t. At t = L too, where the
    code published with the paper leaves the prototypes mapped to A_{L-1}.

    Returns:
        the report: t, L, the norm of every translation, the drift if an oracle is given; and whether there was
        nothing to add.

    Raises:
        UsageError, InputError: options or files that do not fit, a task out of turn, other data for a task that has
            been mapped, a class that belongs to another task.
        TensorMismatchError, AdapterError: adapters that do not fit the model.
        NonFiniteError: features that are NaN or infinite.
        OutputLockedError, WriteError: another run writes the state, or the disk refuses.
    """
    given = options.features or options.data
    if given is None or (options.features and options.data):
        raise UsageError("the task comes as features or as data", hint="give either --features or --data")
    for file in options.oracle:
        if not needs_model(file) and LABELS not in ArrayFile(file).names:
            raise InputError(f"it has no array {LABELS!r}, and an oracle is measured by class", where=file)
    with locked(options.state):
        stored = StoredState(options.state)
        table = Prototypes.of(stored)
        digest = data_sha256(given)
        task = _task(options.task, table, digest, stored, given)
        current = stored.number(task)
        sources = Sources(stored, options.model)
        source = sources.open(current, features=options.features, data=options.data)
        record = _record(options, task, stored, source, digest)
        is_known = task <= len(table.records)
        if is_known:
            _require_same(table.records[task - 1], record, task, options)
            discard(options.state)
        else:
            _require_comparable(table, source, options)
            stored = _add(table, record, task, source, options, stored, tell)
        report = _report(options, stored, table, task)
        report["drift"] = _drift(options, sources, stored, table, tell) if options.oracle else None
    if options.output is not None:
        write_prototypes(table, options.output)
        write_json(options.output.with_suffix(".json"), report)
    return {**report, "was_mapped_already": is_known}


def _task(asked: int | None, table: Prototypes, digest: str, stored: StoredState, where: str) -> int:
    done = len(table.records)
    if asked is None:
        same = [number for number, record in enumerate(table.records, 1) if record.get("data_sha256") == digest]
        return same[0] if same else done + 1
    if asked > done + 1:
        raise InputError(
            f"task {asked} comes after task {done + 1}, which has no prototypes yet",
            where=stored.where,
            hint="map the tasks in their order",
        )
    if asked <= done and table.records[asked - 1].get("data_sha256") != digest:
        raise InputError(
            f"task {asked} was mapped from other data, and prototypes are never overwritten",
            where=where,
            hint=f"give the file that it was mapped from, or map this one as task {done + 1}",
        )
    return asked


def _record(options: MapOptions, task: int, stored: StoredState, source: FeatureSource, digest: str) -> dict[str, Any]:
    """What the rows of a task follow from."""
    return {
        "data_sha256": digest,
        "adapters": stored.fingerprint(stored.number(task)),
        "concatenate": options.concatenate,
        **source.how,
    }


def _require_same(known: dict[str, Any], record: dict[str, Any], task: int, options: MapOptions) -> None:
    """Raise ``InputError`` where a task that has been mapped is asked for in another way."""
    for name in sorted(known):
        allowed = name == "base_fingerprint" and options.model.allow_base_mismatch
        if known[name] != record.get(name) and not allowed:
            raise InputError(
                f"task {task} was mapped with {name.replace('_', ' ')} {known[name]}, now it is {record.get(name)};"
                " prototypes are never overwritten",
                where=str(options.state),
                hint="begin a new state to map it in another way",
            )


def _require_comparable(table: Prototypes, source: FeatureSource, options: MapOptions) -> None:
    for number, known in enumerate(table.records, 1):
        if known.get("concatenate") != options.concatenate:
            raise UsageError(
                f"features without an adapter were {'kept' if known.get('concatenate') else 'not kept'} for task"
                f" {number}",
                where="--concatenate",
                hint="they are kept for all tasks or for none",
            )
        require_comparable(known, source.how, source.where, allow_base_mismatch=options.model.allow_base_mismatch)


def _add(
    table: Prototypes,
    record: dict[str, Any],
    task: int,
    source: FeatureSource,
    options: MapOptions,
    stored: StoredState,
    tell: Tell,
) -> StoredState:
    labels = labels_of(source)
    _require_classes(labels, options.classes, source.where)
    current = stored.number(task)
    moves = current == task
    earlier = range(1, task) if moves else range(0)
    numbers = [current, *earlier, *([0] if options.concatenate else [])]
    source.require(numbers)
    means = ClassMeans(labels)
    table.require_new(means.classes, source.where)
    identity = hashlib.sha256(json.dumps([record, task, options.model.batch], sort_keys=True).encode()).hexdigest()
    pending = Pending(options.state, identity, resume=options.resume)
    for number in numbers:
        if number not in pending.means:
            found = class_means(source, number, tell).means()
            _require_width(found, pending.means.get(current), table, source.where)
            if source.is_slow:
                pending.keep(number, found)
            else:
                pending.means[number] = found
    table.add(
        means.classes,
        means.counts,
        pending.means[current],
        {number: pending.means[number] for number in earlier} if moves else None,
        pending.means[0] if options.concatenate else None,
        record,
    )
    stored = table.save(stored)
    discard(options.state)
    return stored


def _require_classes(labels: Tensor, classes: Sequence[int] | None, where: str) -> None:
    """Raise ``InputError`` where labels are not exactly those of the classes that the task has."""
    if classes is None:
        return
    found = set(labels.unique().tolist())
    if empty := sorted(set(classes) - found):
        raise InputError(f"class {empty[0]} of the task has no examples", where=where)
    if others := sorted(found - set(classes)):
        raise InputError(f"class {others[0]} is in the labels and not among the classes of the task", where=where)


def _require_width(found: Tensor, current: Tensor | None, table: Prototypes, where: str) -> None:
    width = found.shape[1]
    for wanted, whose in ((table.dimension, "the prototypes of earlier tasks"), (_width(current), "other features")):
        if wanted and width != wanted:
            raise InputError(f"features of {width} numbers, {whose} have {wanted}", where=where)


def _width(means: Tensor | None) -> int:
    return 0 if means is None else means.shape[1]


def _drift(options: MapOptions, sources: Sources, stored: StoredState, table: Prototypes, tell: Tell) -> dict[str, Any]:
    """Old data under the adapter of the newest mapped task."""
    current = stored.number(len(table.records))
    with_data = options.features is None
    opened = [
        sources.open(current, features=None if with_data else file, data=file if with_data else None)
        for file in options.oracle
    ]
    for source in opened:
        source.require([current])
    return oracle_drift(table, opened, current, tell)


def _report(options: MapOptions, stored: StoredState, table: Prototypes, task: int) -> dict[str, Any]:
    mine = table.tasks == task
    return {
        "state": str(options.state),
        "task": task,
        "t": len(table.records),
        "L": stored.last,
        "adapter": stored.number(len(table.records)),
        "classes": table.classes[mine].tolist(),
        "examples": int(table.counts[mine].sum()),
        "dimension": table.dimension,
        "shifts": {
            str(number): {
                "norm": float(table.shifts[number - 1].norm()),
                "relative": _relative(table, number),
            }
            for number in range(1, len(table.records) + 1)
        },
        "made_from": dict(sorted(table.records[task - 1].items())),
        "versions": {"pxmerge": __version__, "torch": torch.__version__},
    }


def _relative(table: Prototypes, task: int) -> float:
    """``|Delta|`` over the mean norm of the task's prototypes."""
    size = float(table.vectors[table.tasks == task].norm(dim=1).mean())
    return float(table.shifts[task - 1].norm()) / size if size else 0.0


_IDENTITY = "pxmerge.acmap_pending"


class Pending:
    """Class means by the number of the merged adapter that they were measured under.

    Args:
        identity: of everything that they follow from; what was kept for another one is not taken up.
        resume: take up what is there; else begin anew.
    """

    def __init__(self, state: Path, identity: str, *, resume: bool) -> None:
        self._path = _place(state)
        self._identity = identity
        self.means: dict[int, Tensor] = {}
        if resume:
            with contextlib.suppress(InputError):  # nothing there, or a file that a kill left half written
                checkpoint = open_checkpoint(self._path)
                if checkpoint.metadata.get(_IDENTITY) == identity:
                    self.means = {int(name): tensor for name, tensor in read_tensors(checkpoint).items()}

    def keep(self, number: int, means: Tensor) -> None:
        """Write down one more pass. Raises WriteError."""
        self.means[number] = means
        tensors = {str(one): tensor for one, tensor in self.means.items()}
        write_tensors(self._path, tensors, {_IDENTITY: self._identity})


def discard(state: Path) -> None:
    """Forget the passes: what follows from them is in the state."""
    _place(state).unlink(missing_ok=True)


def _place(state: Path) -> Path:
    return state.with_name(state.name + ".pending")


def oracle_drift(table: Prototypes, sources: Sequence[FeatureSource], current: int, tell: Tell) -> dict[str, Any]:
    """``|p_oracle - p~_c| / |p_c|`` before (p~ = p) and after mapping: means over the classes of each task, and over
    all of the classes that were measured again.

    Args:
        sources: old data with their labels.
        current: the number of the merged adapter in use.

    Raises:
        InputError: no labels, classes that are in no mapped task or in two of the sources, or features of another
            width.
    """
    rows: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    mapped = table.mapped()
    for source in sources:
        found = class_means(source, current, tell)
        owners = table.task_of(found.classes)
        if not bool((owners > 0).all()):
            unknown = int(found.classes[owners == 0][0])
            raise InputError(f"class {unknown} is in no task that has been mapped", where=source.where)
        means = found.means()
        if means.shape[1] != table.dimension:
            raise InputError(
                f"features of {means.shape[1]} numbers, the prototypes have {table.dimension}", where=source.where
            )
        places = torch.searchsorted(table.classes, found.classes)
        if rows and bool(torch.isin(places, torch.cat(rows)).any()):
            raise InputError("it has classes that another oracle has too", where=source.where)
        size = table.vectors[places].norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(places)
        before.append((means - table.vectors[places]).norm(dim=1) / size)
        after.append((means - mapped[places]).norm(dim=1) / size)
    tasks, old, new = table.tasks[torch.cat(rows)], torch.cat(before), torch.cat(after)
    return {
        "before": float(old.mean()),
        "after": float(new.mean()),
        "tasks": {
            str(int(task)): {
                "classes": int((tasks == task).sum()),
                "before": float(old[tasks == task].mean()),
                "after": float(new[tasks == task].mean()),
            }
            for task in tasks.unique()
        },
    }
