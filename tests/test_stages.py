"""Where the time of a run goes."""

from __future__ import annotations

import time

from mergekit_px.stages import measured, timed


def _busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_stages_count_their_own_time_alone_and_the_rest_is_other() -> None:
    with measured() as stages:
        with timed("arithmetic"):
            _busy(0.02)
            with timed("read"):
                time.sleep(0.05)
        _busy(0.03)
    times = {row.stage: row for row in stages.rows()}
    assert list(times) == ["start", "read", "arithmetic", "other"]
    assert times["arithmetic"].processor >= 0.02
    assert times["read"].waiting >= 0.04
    # Nothing is counted twice: one thread cannot spend more than there was.
    assert sum(row.processor + row.waiting for row in stages.rows()[1:3]) <= stages.seconds
    assert times["other"].processor >= 0.03


def test_nothing_is_measured_unless_asked() -> None:
    with timed("read"):
        pass
    with measured() as stages:
        pass
    assert [row.stage for row in stages.rows()] == ["start", "other"]
