"""A set of numbers kept as disjoint, sorted, half-open ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class RangeSet:
    """Which bytes of a file are there. Ranges that touch become one, so that it stays small."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0
        """How many numbers are in the set."""

    def add(self, start: int, stop: int) -> None:
        """Add ``start .. stop - 1``; what is there already stays."""
        if start >= stop:
            return
        # Ranges first .. last - 1 touch or overlap the new one.
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
            self.total -= sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        self.total += stop - start

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of ``start .. stop - 1`` is in the set."""
        if start >= stop:
            return True
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and self._stops[place] >= stop

    def prefix(self) -> int:
        """The first number from 0 on that is not in the set."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0
