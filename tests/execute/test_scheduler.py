from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mergekit_px.execute.scheduler import Job, Routine, Scheduler


def run(routines: Iterator[Routine[None]], workers: int = 3, memory: int = 0) -> None:
    Scheduler(lambda: None, workers, memory).run(routines)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_routine_gets_its_results_in_order_and_goes_on(workers: int) -> None:
    seen: list[list[int]] = []

    def routine(number: int) -> Routine[None]:
        results = yield [Job(lambda _, n=n: number * 10 + n) for n in range(4)]
        seen.append(results)
        results = yield []
        assert results == []
        (total,) = yield [Job(lambda _: sum(seen[-1]))]
        assert isinstance(total, int)

    run((routine(n) for n in range(20)), workers)
    assert sorted(seen) == [[n * 10 + m for m in range(4)] for n in range(20)]


@pytest.mark.parametrize(("memory", "expected"), [(0, 1), (25, 2), (100, 4)])
def test_large_jobs_run_together_as_far_as_they_fit(memory: int, expected: int) -> None:
    running = 0
    most = 0
    lock = threading.Lock()
    full = threading.Event()

    def large(_: None) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == expected:
                full.set()
        assert full.wait(5)
        time.sleep(0.005)
        with lock:
            running -= 1

    def routine() -> Routine[None]:
        yield [Job(large, memory=10)]

    run((routine() for _ in range(10)), workers=4, memory=memory)
    assert most == expected


def test_small_jobs_go_on_beside_a_large_one() -> None:
    started = threading.Event()
    released = threading.Event()

    def large(_: None) -> None:
        started.set()
        assert released.wait(5)

    def small(_: None) -> None:
        assert started.wait(5)
        released.set()

    def routine(job: Job[None]) -> Routine[None]:
        yield [job]

    run(iter([routine(Job(large, memory=1)), routine(Job(large, memory=1)), routine(Job(small))]), workers=2)


def test_the_first_error_stops_the_run_and_is_raised() -> None:
    done: list[int] = []

    def fail(_: None) -> None:
        raise ValueError("broken")

    def routine(number: int) -> Routine[None]:
        yield [Job(fail if number == 3 else lambda _: done.append(number))]

    with pytest.raises(ValueError, match="broken"):
        run((routine(n) for n in range(1000)), workers=2)
    assert len(done) < 100


def test_an_error_in_a_routine_is_raised_too() -> None:
    def routine() -> Routine[None]:
        yield [Job(lambda _: None)]
        raise RuntimeError("between batches")

    with pytest.raises(RuntimeError, match="between batches"):
        run(iter([routine()]))


def test_routines_are_started_only_as_needed() -> None:
    started = 0
    finished = 0
    ahead = 0

    def job(_: None) -> None:
        nonlocal finished, ahead
        ahead = max(ahead, started - finished)
        finished += 1

    def routine() -> Routine[None]:
        nonlocal started
        started += 1
        yield [Job(job)]

    run((routine() for _ in range(200)), workers=2)
    assert finished == 200
    assert ahead <= 4
