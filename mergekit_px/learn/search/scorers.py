"""Scores of several models side by side: programs in threads, everything else in processes of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import torch

from mergekit_px.errors import RunError
from mergekit_px.learn.search.harness import HarnessScore
from mergekit_px.learn.search.objectives import Metrics
from mergekit_px.learn.search.score import CommandScore, DataScore, Score
from mergekit_px.learn.search.settings import SearchSettings

Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")
Scores = dict[Part, Score]


def make_scores(settings: SearchSettings, device: torch.device) -> Scores:
    """What the choice is by, and what the result is tested by, if anything.

    Raises:
        UsageError, InputError: a command, data or tasks that cannot be used.
    """
    if settings.data is not None:
        scores = DataScore(settings, device)
        parts = PARTS if settings.tested else PARTS[:1]
        return {part: scores.score(part) for part in parts}
    named: dict[Part, str | None]
    if settings.evaluate is not None:
        named = {"validation": settings.evaluate, "test": settings.test_evaluate}
        return {part: HarnessScore(tasks, settings, device) for part, tasks in named.items() if tasks is not None}
    named = {"validation": settings.score, "test": settings.test_score}
    return {part: CommandScore(command) for part, command in named.items() if command is not None}


class Scorers:
    """Gives models to scores, so many at once. With one, a model is scored here and now."""

    def __init__(self, settings: SearchSettings, device: torch.device) -> None:
        self._scores = make_scores(settings, device)
        self._pool: Executor | None = None
        self._asked: list[Future[Metrics]] = []
        jobs = settings.jobs or 1
        if jobs > 1 and settings.score is not None:
            self._pool = ThreadPoolExecutor(jobs)
        elif jobs > 1:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork, nor do threads
            self._pool = ProcessPoolExecutor(jobs, context, _begin_worker, (settings, device))

    def submit(self, folder: Path, part: Part = "validation") -> Future[Metrics]:
        """The numbers of a model, now or later."""
        if self._pool is None:
            done: Future[Metrics] = Future()
            try:
                done.set_result(self._scores[part](folder))
            except Exception as error:
                done.set_exception(error)
            return done
        if isinstance(self._pool, ThreadPoolExecutor):
            future = self._pool.submit(self._scores[part], folder)
        else:
            future = self._pool.submit(_score_in_worker, folder, part)
        self._asked.append(future)
        return future

    def close(self) -> None:
        """End what is running."""
        if self._pool is None:
            return
        for score in self._scores.values():
            if isinstance(score, CommandScore):
                score.stop()
        busy = not all(future.done() for future in self._asked)
        workers = list((getattr(self._pool, "_processes", None) or {}).values()) if busy else []
        self._pool.shutdown(wait=not workers, cancel_futures=True)
        for worker in workers:
            worker.terminate()
            worker.join()


def result_of(future: Future[Metrics]) -> Metrics:
    """The numbers. Raises what the score did, and ``RunError`` where its process died."""
    try:
        return future.result()
    except BrokenProcessPool:
        what = "a process that scores models ended by itself"
        raise RunError(what, where="--jobs", hint="it may have run out of memory: give fewer --jobs") from None


_worker: Scores = {}
"""Of a process that scores."""


def _begin_worker(settings: SearchSettings, device: torch.device) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // (settings.jobs or 1)))
    _worker.update(make_scores(settings, device))


def _score_in_worker(folder: Path, part: Part) -> Metrics:
    return _worker[part](folder)
