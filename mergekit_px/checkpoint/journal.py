"""What has been written so far: one line per finished range, so that a killed run can go on.

The first line names the plan. A line is appended after its bytes are in the file, by one ``write``; a line
that is torn or missing only means that its range is computed again.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.checkpoint.index import is_inside
from mergekit_px.errors import MalformedCheckpointError, OutputError
from mergekit_px.small_files import open_regular

_VERSION = 2
_LONGEST_HEAD = 1 << 26  # a name for each file of an older output


@dataclass(frozen=True, slots=True)
class FinishedRange:
    """Bytes ``start .. stop - 1`` of ``tensor`` are in its file and have this CRC-32."""

    tensor: str
    start: int
    stop: int
    crc32: int


class Journal:
    """An open journal, to be appended to by several threads."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, plan_hash: str, *, replaces: Sequence[str]) -> Journal:
        """Begin a journal. ``replaces``: files of an older output, which publishing removes. Raises ``OSError``."""
        first = json.dumps({"pxmerge_journal": _VERSION, "plan": plan_hash, "replaces": list(replaces)}) + "\n"
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(first, encoding="utf-8")
        temporary.replace(path)
        return cls(path, os.open(path, os.O_WRONLY | os.O_APPEND))

    @classmethod
    def reopen(cls, path: Path) -> Journal:
        """Go on with a journal; an unfinished last line is ended first. Raises ``OSError``."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        size = os.lseek(descriptor, 0, os.SEEK_END)
        os.lseek(descriptor, max(size - 1, 0), os.SEEK_SET)
        if os.read(descriptor, 1) != b"\n":
            os.write(descriptor, b"\n")
        return cls(path, descriptor)

    def append(self, finished: FinishedRange) -> None:
        """Record a range whose bytes have been written. Raises ``OSError``."""
        line = json.dumps([finished.tensor, finished.start, finished.stop, finished.crc32]).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class JournalHead:
    """The first line of a journal. ``plan_hash``: empty for what cannot be resumed."""

    plan_hash: str
    replaces: tuple[str, ...]


def read_head(path: Path) -> JournalHead | None:
    """The first line; None where there is no journal. Raises ``OutputError`` where it cannot be understood."""
    try:
        with os.fdopen(open_regular(path, str(path)), "rb") as file:
            head = json.loads(file.readline(_LONGEST_HEAD))
        if head["pxmerge_journal"] == _VERSION:
            return JournalHead(str(head["plan"]), tuple(name for name in head["replaces"] if is_inside(name)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, MalformedCheckpointError):
        pass
    raise OutputError(
        "the journal of the unfinished run cannot be read", where=str(path), hint="start over with --overwrite"
    )


def read_ranges(path: Path) -> Iterator[FinishedRange]:
    """The recorded ranges in order; lines that cannot be understood are left out. Raises ``OSError``."""
    with path.open("rb") as file:
        file.readline()
        for line in file:
            try:
                tensor, start, stop, crc32 = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(tensor, str) and all(type(number) is int for number in (start, stop, crc32)):
                yield FinishedRange(tensor, start, stop, crc32)


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
