"""Where an item's elements are written, and its values in encoded form: codes, and scales by largest magnitudes."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import torch

from mergekit_px.execute.values import check_finite
from mergekit_px.plan.model import WorkItem
from mergekit_px.storage.encoding import Encodable


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of a tensor of the output."""

    name: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def spans(item: WorkItem, start: int, stop: int) -> list[Span]:
    """Where the elements [start, stop) of an item are written; whole groups of joint rows where it is encoded."""
    if item.encoding is None:
        width = item.dtype.bits // 8
        return [Span(item.name, start * width, stop * width)]
    row = _row(item)
    places = item.encoding.spans(start // row, stop // row)
    return [
        Span(part.name, places[role][0] * part.dtype.bits // 8, places[role][1] * part.dtype.bits // 8)
        for role, part in item.encoding.parts.items()
    ]


def encoded(item: WorkItem, value: torch.Tensor, start: int, largest: torch.Tensor | None) -> list[torch.Tensor]:
    """The bytes of each part of an encoded item, of its elements from ``start`` on.

    Args:
        largest: the largest magnitudes of the whole item, where its scales are over more than these elements.

    Raises:
        NonFiniteError: a value that no scale can stand for.
    """
    encoding, begin = _encoding(item), start // _row(item)
    rows = _rows(item, value)
    if largest is None:
        own = encoding.largest(rows, begin)
    else:
        joint = encoding.joint_rows
        own = largest[begin // joint : -(-(begin + len(rows)) // joint)].to(value.device)
    parts = encoding.encoded(rows, begin, own)
    return [parts[role].view(torch.uint8) for role in encoding.parts]


@dataclass
class Ranges:
    """The largest magnitudes of an item for each of its scales, gathered from its pieces in any order."""

    item: WorkItem
    _found: dict[int, torch.Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, start: int, value: torch.Tensor) -> None:
        encoding, begin = _encoding(self.item), start // _row(self.item)
        found = encoding.largest(_rows(self.item, value), begin).cpu()
        with self._lock:
            for place, row in enumerate(found, begin // encoding.joint_rows):
                known = self._found.get(place)
                self._found[place] = row.clone() if known is None else torch.maximum(known, row)

    @property
    def largest(self) -> torch.Tensor:
        return torch.stack([self._found[place] for place in sorted(self._found)])

    def scales(self) -> torch.Tensor:
        """The bytes of all scales."""
        encoding = _encoding(self.item)
        none = torch.zeros((0, *self.item.shape[1:]))
        return encoding.encoded(none, 0, self.largest)["scales"].view(torch.uint8)


def _encoding(item: WorkItem) -> Encodable:
    assert item.encoding is not None
    return item.encoding


def _row(item: WorkItem) -> int:
    return max(1, math.prod(item.shape[1:]))


def _rows(item: WorkItem, value: torch.Tensor) -> torch.Tensor:
    check_finite(value, item.name, "the merged value")
    return value.reshape(-1, *item.shape[1:])
