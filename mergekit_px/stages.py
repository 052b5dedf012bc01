"""Where the time of a run goes: processor time and waiting, by stage.

    with measured() as stages:
        with timed("read"):
            ...
    stages.rows()

Any thread may be in a stage, and stages may be inside one another: each counts its own time alone. Outside of
``measured`` a stage costs next to nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

# The order in which they are shown: what a value goes through, then what goes on beside it.
ORDER = ("start", "import", "plan", "read", "decode", "arithmetic", "check", "round", "write", "hash", "sync", "wait")


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds in one stage, summed over all threads.

    ``waiting`` is the time in it without a processor: for the disk, for another thread, for the interpreter.
    """

    stage: str
    processor: float
    waiting: float


class Stages:
    """The times of one run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = threading.local()
        self._spent: dict[str, tuple[int, int]] = {"start": (time.process_time_ns(), 0)}
        self._began = time.perf_counter_ns()

    def rows(self) -> list[StageTime]:
        """All stages in their order; ``other`` is what no stage accounts for."""
        with self._lock:
            spent = dict(self._spent)
        total = time.process_time_ns()
        spent["other"] = (max(0, total - sum(processor for processor, _ in spent.values())), 0)
        names = [name for name in (*ORDER, "other") if name in spent]
        return [StageTime(name, spent[name][0] / 1e9, spent[name][1] / 1e9) for name in names]

    @property
    def seconds(self) -> float:
        """Since the measurement began."""
        return (time.perf_counter_ns() - self._began) / 1e9

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        inner: list[tuple[int, int]] = getattr(self._threads, "inner", [])
        self._threads.inner = inner
        inner.append((0, 0))
        processor, wall = time.thread_time_ns(), time.perf_counter_ns()
        try:
            yield
        finally:
            processor, wall = time.thread_time_ns() - processor, time.perf_counter_ns() - wall
            self.count(name, processor, wall, inside=inner.pop())

    def count(self, name: str, processor: int, wall: int, inside: tuple[int, int] = (0, 0)) -> None:
        """Nanoseconds of a stage, with those of the stages inside it; the stage around it, if there is one, is told."""
        inner = self._threads.inner
        if inner:
            inner[-1] = (inner[-1][0] + processor, inner[-1][1] + wall)
        processor, wall = processor - inside[0], wall - inside[1]
        with self._lock:
            known = self._spent.get(name, (0, 0))
            self._spent[name] = (known[0] + processor, known[1] + max(0, wall - processor))


_measuring: Stages | None = None
_NOTHING = nullcontext()


def timed(name: str) -> AbstractContextManager[None]:
    """What is done inside is time of the stage ``name``, one of :data:`ORDER`."""
    return _NOTHING if _measuring is None else _measuring.timed(name)


def is_measuring() -> bool:
    """Whether times are wanted."""
    return _measuring is not None


def count(name: str, processor: int, wall: int) -> None:
    """Add nanoseconds to a stage that were measured otherwise, within another stage, from whose time they are taken."""
    if _measuring is not None:
        _measuring.count(name, processor, wall)


@contextmanager
def measured() -> Iterator[Stages]:
    """Measure the stages of all threads; one measurement at a time."""
    global _measuring
    _measuring = stages = Stages()
    try:
        yield stages
    finally:
        _measuring = None
