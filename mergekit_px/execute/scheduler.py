"""Runs routines of jobs on worker threads.

A routine is a generator: it yields a batch of jobs, is sent their results in order when all of them are done, and
goes on from there. Jobs of several routines run side by side; a routine is started only when the jobs at hand
would leave a worker idle, so what waits is bounded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mergekit_px.stages import timed

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Job(Generic[W]):
    """One piece of work; ``memory`` is what it occupies beyond its worker's buffers, in bytes."""

    run: Callable[[W], Any]
    memory: int = 0


Routine = Generator[Sequence[Job[W]], list[Any], None]


class _Batch(Generic[W]):
    __slots__ = ("missing", "results", "routine")

    def __init__(self, routine: Routine[W], size: int) -> None:
        self.routine = routine
        self.results: list[Any] = [None] * size
        self.missing = size


class Scheduler(Generic[W]):
    """Drives routines until they are exhausted, one fails, or :meth:`stop` is called.

    Args:
        make_worker: called in each thread; its result is handed to every job that the thread runs.
        workers: number of threads.
        memory: jobs that need memory run side by side as far as they fit in it together; one runs in any case.
    """

    def __init__(self, make_worker: Callable[[], W], workers: int, memory: int = 0) -> None:
        self._make_worker = make_worker
        self._workers = workers
        self._state = threading.Condition()
        self._memory = memory
        self._held = 0
        self._small: deque[tuple[_Batch[W], int, Job[W]]] = deque()
        self._large: deque[tuple[_Batch[W], int, Job[W]]] = deque()
        self._running = 0
        self._routines: Iterator[Routine[W]] = iter(())
        self._exhausted = False
        self._failure: BaseException | None = None
        self._stopped = False

    def run(self, routines: Iterator[Routine[W]]) -> None:
        """Run all routines to their end; the first exception of a job or routine is raised here."""
        self._routines = iter(routines)
        self._exhausted = False
        threads = [
            threading.Thread(target=self._work, name=f"pxmerge-worker-{number}", daemon=True)
            for number in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    # A join without a limit cannot be interrupted on every platform.
                    thread.join(0.2)
        except BaseException:
            self.stop()
            for thread in threads:
                thread.join()
            raise
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let running jobs end and start no others."""
        with self._state:
            self._stopped = True
            self._state.notify_all()

    def _work(self) -> None:
        try:
            worker = self._make_worker()
            while (task := self._next()) is not None:
                batch, place, job = task
                result = job.run(worker)
                self._finish(batch, place, job, result)
        except BaseException as error:
            with self._state:
                if self._failure is None:
                    self._failure = error
                self._stopped = True
                self._state.notify_all()

    def _next(self) -> tuple[_Batch[W], int, Job[W]] | None:
        with self._state:
            while not self._stopped:
                if self._large and (self._held == 0 or self._held + self._large[0][2].memory <= self._memory):
                    self._held += self._large[0][2].memory
                    self._running += 1
                    return self._large.popleft()
                if self._small:
                    self._running += 1
                    return self._small.popleft()
                # Only a bounded number of large jobs may wait for memory.
                if not self._exhausted and len(self._large) < self._workers:
                    self._start_routine()
                    continue
                if self._running == 0 and not self._large:
                    self._state.notify_all()
                    return None
                with timed("wait"):
                    self._state.wait()
            return None

    def _start_routine(self) -> None:
        try:
            routine = next(self._routines)
        except StopIteration:
            self._exhausted = True
            self._state.notify_all()
            return
        self._advance(routine, None)

    def _advance(self, routine: Routine[W], results: list[Any] | None) -> None:
        """Take a routine's next batch; called with the state held."""
        while True:
            try:
                jobs = next(routine) if results is None else routine.send(results)
            except StopIteration:
                return
            if jobs:
                break
            results = []
        batch = _Batch(routine, len(jobs))
        for place, job in enumerate(jobs):
            (self._large if job.memory else self._small).append((batch, place, job))
        self._state.notify_all()

    def _finish(self, batch: _Batch[W], place: int, job: Job[W], result: Any) -> None:
        with self._state:
            self._running -= 1
            self._held -= job.memory
            batch.results[place] = result
            batch.missing -= 1
            if batch.missing == 0:
                self._advance(batch.routine, batch.results)
            self._state.notify_all()
