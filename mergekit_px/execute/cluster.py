"""One merge by the workers of a Ray cluster: the parts of ``run --part``, one for each file of the output.

A task is told the recipe, its number and the totals of sweeps, and says what it did: weights go from the file system or
the store to the worker and back. Statistics over the whole model are swept by all workers and added up here, in an
order that does not depend on them. A task that is lost with its worker is begun again and goes on from its journal.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.destination import (
    STATE_FOLDER,
    cannot_use,
    check_mode,
    output_state,
    recorded_lock,
    require_folder,
)
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import OutputError, OutputLockedError, UsageError
from mergekit_px.execute.array import array_folder, part_counts, partition, publish_parts, run_part
from mergekit_px.execute.events import Progress, Report, RunResult
from mergekit_px.execute.ray_tasks import RayTasks, SharedFolders, parse_cluster, same_inputs
from mergekit_px.execute.run import begun, partial_sums, peak_memory, plan_checkpoints
from mergekit_px.execute.store_output import StoreOutput
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.plan.schedule import evenly, shared_groups
from mergekit_px.recipe.loaded import LoadedRecipe

if TYPE_CHECKING:
    import torch

Totals = list[list["torch.Tensor"]]
"""For each group of tensors that share statistics: the totals of its sweeps so far."""

_WITNESS = "cluster"
_PATIENCE = 30.0
"""Seconds in which a worker that the cluster has given up lets go of its part."""


@dataclass(frozen=True)
class MergeAssignment:
    """What all tasks of a merge are told."""

    loaded: LoadedRecipe
    options: PlanOptions
    folders: SharedFolders
    plan_hash: str

    def begin(self) -> Plan:
        """The plan of the whole merge, on this worker. Raises ``PlanError`` where it does not see what it must."""
        self.folders.enter()
        with same_inputs() as require_equal:
            plan = build_plan(self.loaded, self.options)
            require_equal(plan.hash, self.plan_hash)
        return plan

    def stop(self) -> None:
        """A part goes on from its journal, so nothing is to be ended."""


def run_on_cluster(plan: Plan, cluster: str, *, progress: Report | None = None) -> RunResult:
    """Run a plan by the workers of a cluster: ``ray``, begun here, or ``ray:HOST:PORT``, which runs.

    Raises:
        UsageError: no such kind of cluster.
        ClusterError: it does not answer.
        PlanError: its workers cannot do what is asked.
        RunError: a part was lost with its worker too often; what is there is kept, and a run goes on from it.
        PxmergeError: what :func:`run_plan` raises.
    """
    if plan.output is None:
        raise UsageError("a merge in memory has no parts")
    started = time.perf_counter()
    address = parse_cluster(cluster)
    with ExitStack() as stack:
        output = stack.enter_context(closing(StoreParts(plan) if plan.store is not None else FolderParts(plan)))
        ready = output.begin(progress)
        if isinstance(ready, RunResult):
            return ready
        plan = ready
        tasks = stack.enter_context(RayTasks.connected(address, plan, plan.device))
        options = replace(plan.options, threads=tasks.threads, device=tasks.device, require_room=False, lock=plan.lock)
        folders = SharedFolders(str(Path.cwd()), str(plan.output), output.witness)
        tasks.begin(MergeAssignment(plan.loaded, options, folders, plan.hash))
        there = output.finished()
        sizes = {shard.file: shard.size for shard in plan.layout.shards}
        missing = {
            number: sum(map(sizes.__getitem__, share))
            for number, share in enumerate(output.shares, 1)
            if share and number not in there
        }
        if missing:
            tasks.prepare(make_ready)
        totals = swept(plan, tasks) if missing else []
        results = tasks.run(write_part, missing, totals, _progress_of(plan, missing, progress))
        files = output.publish()
    warnings = dict.fromkeys(line for result in results.values() for line in result.warnings)
    if (files_made := len(plan.layout.shards)) < tasks.places:
        warnings[f"{tasks.places} workers had room, and {files_made} files to make; see --shard-size"] = None
    if tasks.lost:
        warnings[f"{tasks.lost} of the workers were lost, and what they did was begun again"] = None
    return RunResult(
        output=plan.output or Path(),
        files=files,
        seconds=time.perf_counter() - started,
        bytes_read=sum(result.bytes_read for result in results.values()),
        bytes_written=sum(missing.values()),
        peak_memory=max([peak_memory(), *(result.peak_memory for result in results.values())]),
        notes=plan.notes,
        warnings=tuple(warnings),
    )


def _progress_of(plan: Plan, missing: Mapping[int, int], progress: Report | None) -> Callable[[int, Progress], None]:
    done: dict[int, int] = {}
    total = plan.bytes_written
    before = total - sum(missing.values())

    def tell(number: int, state: Progress) -> None:
        if progress is not None and state.phase in ("merging", "publishing", "done"):
            done[number] = missing[number] if state.phase != "merging" else state.bytes_done
            progress(replace(state, phase="merging", bytes_done=before + sum(done.values()), bytes_total=total))

    return tell


def swept(plan: Plan, tasks: RayTasks) -> Totals:
    """The totals of all sweeps over the whole model, each shared out among the workers."""
    totals: Totals = []
    for group in shared_groups(plan.items):
        from mergekit_px.execute import sweeps

        totals.append([])
        shares = evenly([item.elements for item, _ in group], tasks.places)

        def total(sweep: Any, shares: Sequence[Sequence[int]] = shares) -> torch.Tensor:
            sums = sweeps.Totals()
            found = tasks.run(sweep_share, dict(enumerate(shares)), totals, lambda number, state: None)
            for number in sorted(found):
                sums.join(found[number])
            totals[-1].append(sums.total())
            return totals[-1][-1]

        sweeps.driven(group[0][1], sum(item.elements for item, _ in group), total)
    return totals


def make_ready(plan: Plan, number: int, argument: None, totals: Totals, report: Report) -> None:
    """What a worker does while this machine gets ready itself: the plan, and the longest import."""
    if shared_groups(plan.items):
        importlib.import_module("torch")


def sweep_share(plan: Plan, number: int, share: Sequence[int], totals: Totals, report: Report) -> Any:
    """What a worker adds to a sweep."""
    with ExitStack() as stack:
        readers = {
            label: stack.enter_context(closing(open_reader(checkpoint)))
            for label, checkpoint in plan_checkpoints(plan).items()
        }
        return partial_sums(plan, readers, share, totals)


def write_part(plan: Plan, number: int, size: int, totals: Totals, report: Report) -> RunResult | None:
    """What a worker does for a part. A worker that was given up may still hold it for a while."""
    deadline = time.monotonic() + _PATIENCE
    if plan.store is not None:
        return StoreOutput(plan).put(number, report, totals=totals)
    while True:
        try:
            return run_part(plan, number, len(plan.layout.shards), progress=report, fresh=False, totals=totals)
        except OutputLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class FolderParts:
    """The parts of an output in a folder."""

    def __init__(self, plan: Plan) -> None:
        assert plan.output is not None
        self._plan = plan
        self._output = plan.output
        self._lock: DirectoryLock | None = None
        self.shares = partition(plan.layout, len(plan.layout.shards))
        self.witness: tuple[str, bytes] | None = None

    def begin(self, progress: Report | None) -> Plan | RunResult:
        """Make the folder ready. The plan with inputs that are here; or the result, where it is there already.

        Raises ``OutputError`` where the folder holds something else, ``OutputLockedError``.
        """
        where, mode, count = str(self._output), self._plan.options.mode, len(self.shares)
        require_folder(self._output)
        if mode == "resume" and output_state(self._output).unfinished is not None:
            raise OutputError(
                "the unfinished run there is none of a cluster",
                where=where,
                hint="continue it without --cluster, or start over with --overwrite",
            )
        if mode == "resume":  # what is there of an array goes on in any case
            self._plan = replace(self._plan, options=replace(self._plan.options, mode="new"))
        found = begun(self._plan, progress)
        if isinstance(found, RunResult):
            return found
        check_mode(self._output, found.options.mode, found.hash)
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock.take(self._output / STATE_FOLDER / _WITNESS, where)
        except OSError as error:
            raise cannot_use(self._output, error) from error
        self.witness = (str(self._lock.path.absolute()), self._lock.path.read_bytes())
        if mode == "overwrite":
            shutil.rmtree(array_folder(self._output), ignore_errors=True)
        other = [other for other in part_counts(self._output) if other != count]
        if other:
            raise OutputError(
                f"parts of {other[0]} are there, and the output has {count} files",
                where=where,
                hint="finish them with --part and pxmerge publish, or start over with --overwrite",
            )
        return found

    def finished(self) -> set[int]:
        """The parts that are there whole."""
        home, count = array_folder(self._output), len(self.shares)
        locks = {number: recorded_lock(home / f"{number}-of-{count}") for number in range(1, count + 1)}
        return {number for number, lock in locks.items() if lock.get("plan_hash") == self._plan.hash}

    def publish(self) -> dict[str, str]:
        """Put all in place; file -> sha256."""
        names = publish_parts(self._output, overwrite=self._plan.options.mode == "overwrite")
        listed = recorded_lock(self._output).get("files", {})
        return {name: str(listed[name]["sha256"]) for name in names if name in listed}

    def close(self) -> None:
        """Let go of the folder, and leave none that is empty."""
        if self._lock is not None:
            self._lock.release(remove=True)
            with suppress(OSError):
                self._lock.path.parent.rmdir()
                self._output.rmdir()


class StoreParts:
    """The parts of an output in a store; see :class:`FolderParts`."""

    witness = None

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._output = StoreOutput(plan)
        self.shares = self._output.shares

    def begin(self, progress: Report | None) -> Plan | RunResult:
        self._output.begin()
        return self._plan

    def finished(self) -> set[int]:
        return set(self._output.finished())

    def publish(self) -> dict[str, str]:
        return self._output.publish()

    def close(self) -> None:
        pass
