"""The journal of an unfinished run, and its sets of ranges against sets of numbers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.checkpoint.journal import RangeSet, read_head


def test_below_a_file_there_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert read_head(tmp_path / "file" / "journal.jsonl") is None


ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20)


@given(ranges)
def test_like_a_set_of_numbers(added) -> None:
    ours, numbers = RangeSet(), set()
    for start, stop in added:
        ours.add(start, stop)
        numbers |= set(range(start, stop))
        assert ours.total == len(numbers)
    for start in range(31):
        for stop in range(31):
            assert ours.covers(start, stop) == (set(range(start, stop)) <= numbers)
    assert ours.prefix() == next(number for number in range(32) if number not in numbers)


def test_touching_ranges_become_one() -> None:
    ours = RangeSet()
    for start in [*range(0, 100, 2), *range(1, 100, 2)]:
        ours.add(start, start + 1)
    assert (ours._starts, ours._stops) == ([0], [100])
