"""Where the trials of a search are merged and scored: here, or on a cluster."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

from mergekit_px.errors import NonFiniteError
from mergekit_px.learn.life import Run
from mergekit_px.learn.search.cluster import ClusterBench
from mergekit_px.learn.search.merges import Merges
from mergekit_px.learn.search.objectives import Metrics
from mergekit_px.learn.search.scorers import Part, Scorers
from mergekit_px.learn.search.scratch import scratch_folder
from mergekit_px.learn.search.settings import SearchSettings
from mergekit_px.learn.search.trials import Values
from mergekit_px.plan.model import Plan

_KEPT = "kept"


class Bench(Protocol):
    """Merges and scores, so many trials at once."""

    @property
    def places(self) -> int:
        """How many."""

    def begin(self, values: Values, plan: Plan, part: Part) -> Future[Metrics]:
        """The numbers of the model of a plan, now or later; ``NonFiniteError`` where it has none."""


@contextmanager
def begun_bench(run: Run[SearchSettings], merges: Merges, keeps: bool, scorers: Scorers | None) -> Iterator[Bench]:
    """The bench that settings ask for; what it made is removed with the block.

    Args:
        keeps: tensors that are the same in every trial are merged once.
        scorers: of this machine; None where a cluster is to score.

    Raises:
        OutputError: a place for trials that cannot be used.
    """
    settings = run.settings
    with ExitStack() as stack:
        if scorers is None:
            yield stack.enter_context(closing(ClusterBench(run, merges, keeps)))
            return
        stack.enter_context(closing(scorers))
        places = settings.jobs or 1
        nbytes = merges.first.bytes_written * (places + keeps)
        scratch = stack.enter_context(scratch_folder(settings.scratch, run.work, nbytes, run.note))
        yield LocalBench(merges, scorers, scratch, places, keeps)


class LocalBench:
    """Merges one model at a time, each by all cores, and has several scored beside one another."""

    def __init__(self, merges: Merges, scorers: Scorers, scratch: Path, places: int, keeps: bool) -> None:
        self.places = places
        self._merges, self._scorers = merges, scorers
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(places):
            self._free.put(scratch / (f"trial-{number}" if number else "trial"))
        self._kept, self._keeps = scratch / _KEPT, keeps

    def begin(self, values: Values, plan: Plan, part: Part) -> Future[Metrics]:
        if self._keeps and not self._kept.exists():
            self._merges.keep(self._kept)
        folder = self._free.get()
        try:
            self._merges.make(plan, folder, self._kept if self._keeps else None)
            future = self._scorers.submit(folder, part)
        except NonFiniteError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._free.put(folder))
        return future
