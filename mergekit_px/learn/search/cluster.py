"""Trials of a search as tasks of a Ray cluster: a worker merges a model and scores it, and sends back numbers."""

from __future__ import annotations

import secrets
import shutil
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_px.errors import InputError, PlanError, UsageError
from mergekit_px.execute.ray_tasks import RayTasks, SharedFolders, parse_cluster, same_inputs
from mergekit_px.learn.inputs import open_inputs
from mergekit_px.learn.search.merges import Merges
from mergekit_px.learn.search.objectives import Metrics
from mergekit_px.learn.search.score import stop_programs
from mergekit_px.learn.search.scorers import Part, Scores, make_scores
from mergekit_px.learn.search.scratch import remove_folders, scratch_folder
from mergekit_px.learn.search.settings import SearchSettings
from mergekit_px.learn.search.trials import Values
from mergekit_px.plan.model import Plan

if TYPE_CHECKING:
    from mergekit_px.learn.life import Run

_WITNESS = "cluster"


@dataclass(frozen=True)
class SearchAssignment:
    """What all trials of a search are told.

    Attributes:
        prints: of the inputs.
        threads: of each trial.
        work: a folder that all machines see.
    """

    settings: SearchSettings
    folders: SharedFolders
    prints: dict[str, list[str | None]]
    device: str
    threads: int
    work: Path

    def begin(self) -> WorkerBench:
        self.folders.enter()
        host, scratch = socket.gethostname(), self.settings.scratch
        if scratch is not None and not Path(scratch).expanduser().is_dir():
            raise PlanError(f"the worker on {host} has no folder {scratch}", hint="--scratch names one of each machine")
        with same_inputs() as require_equal:
            require_equal(open_inputs(self.settings).prints(), self.prints)
            merges = Merges(self.settings, self.threads)
        torch.set_num_threads(self.threads)
        try:
            scores = make_scores(self.settings, torch.device(self.device))
        except (InputError, UsageError) as error:
            hint = "what scores must be on all machines of the cluster"
            raise PlanError(f"the worker on {host} cannot score: {error}", hint=hint) from error
        return WorkerBench(self.settings, merges, scores, self.work)

    def stop(self) -> None:
        stop_programs()
        remove_folders()


@dataclass
class WorkerBench:
    """What a worker makes trials with."""

    settings: SearchSettings
    merges: Merges
    scores: Scores
    work: Path


@dataclass(frozen=True)
class Asked:
    """One trial.

    Attributes:
        plan_hash: of its plan, as this machine sees it.
        kept: what holds the tensors that are the same in every trial.
    """

    values: Values
    plan_hash: str
    kept: Path | None
    part: Part


def score_trial(bench: WorkerBench, number: int, asked: Asked, shared: Any, report: Any) -> Metrics:
    """What a worker does for a trial."""
    with same_inputs() as require_equal:
        plan = bench.merges.plan(asked.values)
        require_equal(plan.hash, asked.plan_hash)
    with scratch_folder(bench.settings.scratch, bench.work, plan.bytes_written, lambda line: None) as scratch:
        folder = scratch / "trial"
        bench.merges.make(plan, folder, asked.kept)
        return bench.scores[asked.part](folder)


class ClusterBench:
    """Has the workers of a cluster merge and score; joins it when the first trial is asked for."""

    def __init__(self, run: Run[SearchSettings], merges: Merges, keeps: bool) -> None:
        self._run, self._merges = run, merges
        self._kept = (run.work / "kept").absolute() if keeps else None
        self._witness = run.work / _WITNESS
        self._stack = ExitStack()
        self._joined: tuple[RayTasks, ThreadPoolExecutor] | None = None

    @property
    def places(self) -> int:
        tasks, _ = self._join()
        return min(self._run.settings.jobs or tasks.places, tasks.places)

    def begin(self, values: Values, plan: Plan, part: Part) -> Future[Metrics]:
        tasks, pool = self._join()
        asked = Asked(values, plan.hash, self._kept, part)
        return pool.submit(lambda: tasks.run(score_trial, {0: asked}, None, lambda number, state: None)[0])

    def close(self) -> None:
        """End what is running, and leave the cluster."""
        if self._joined is not None:
            tasks, pool = self._joined
            tasks.stop()
            pool.shutdown(cancel_futures=True)
            if tasks.lost:
                self._run.note(f"{tasks.lost} of the workers were lost, and their trials were begun again")
        self._stack.close()
        self._witness.unlink(missing_ok=True)
        if self._kept is not None:
            shutil.rmtree(self._kept, ignore_errors=True)

    def _join(self) -> tuple[RayTasks, ThreadPoolExecutor]:
        if self._joined is None:
            run, first = self._run, self._merges.first
            settings = run.settings
            # A model that is scored is in memory once more, and so may its files be.
            beside = first.bytes_written * (1 if settings.score is not None else 2)
            joined = RayTasks.connected(parse_cluster(settings.cluster or "ray"), first, run.device.type, beside)
            tasks = self._stack.enter_context(joined)
            work, prints = run.work.absolute(), run.inputs.prints()
            self._witness.write_text(run.identity + secrets.token_hex(8))
            folders = SharedFolders(
                str(Path.cwd()), str(run.output), (str(work / _WITNESS), self._witness.read_bytes())
            )
            tasks.begin(SearchAssignment(settings, folders, prints, tasks.device, tasks.threads, work))
            if self._kept is not None:
                self._merges.keep(self._kept)
            run.note(
                f"trials are merged and scored by workers of the cluster, which has room for {tasks.places} at once"
            )
            self._joined = (tasks, ThreadPoolExecutor(tasks.places))
        return self._joined
