"""Exact order statistics of magnitudes, found by counting: no copy of the data and no sort.

The bits of a nonnegative float, read as an integer, are in the order of the values. A search descends through
these bits from the top, one digit (up to 16 bits) per sweep over the data: a sweep counts how often each value of
the next digit occurs among the magnitudes that begin with the digits found so far. That is a radix selection;
float32 takes 2 sweeps and float64 takes 4, whatever the distribution. Counts add up over blocks in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Searched = Literal["float32", "float64"]

_INTEGER = {"float32": "int32", "float64": "int64"}
_MAGNITUDE_BITS = {"float32": 31, "float64": 63}

_WIDE_DIGIT = 16
_NARROW_DIGIT = 11
_NARROW_BELOW = 2**16
"""Elements under which clearing and adding 2**16 counters would cost more than another sweep."""


@dataclass(frozen=True, slots=True)
class Target:
    """The ``rank``-th largest of those magnitudes of tensor ``source`` whose bits begin with ``prefix``.

    The bits that are still unknown are 0 in ``prefix``.
    """

    source: int
    rank: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class RankSearch:
    """State of a search for one or more order statistics; each step needs a count over all blocks.

        search = RankSearch.start([(0, 10), (1, 10)], elements)
        while not search.done:
            search = search.narrow(sum(search.count(block) for block in blocks))
        search.values()

    Blocks are float32 or float64; where some are of each, all magnitudes are compared as float64.
    """

    targets: tuple[Target, ...]
    digit: int
    """Bits that one sweep finds."""
    dtype: Searched | None = None
    """The type whose bits are searched; None before a sweep has seen the data."""
    unknown: int = 0
    """How many low bits are still unknown."""

    @classmethod
    def start(cls, ranks: Sequence[tuple[int, int]], elements: int) -> RankSearch:
        """Search for pairs (source, rank), rank 1 being the largest of that source's ``elements`` magnitudes.

        Raises:
            ValueError: for a rank below 1 or above the number of elements.
        """
        for source, rank in ranks:
            if not 1 <= rank <= elements:
                raise ValueError(f"source {source}: there is no rank {rank} among {elements} elements")
        digit = _NARROW_DIGIT if elements < _NARROW_BELOW else _WIDE_DIGIT
        return cls(tuple(Target(source, rank) for source, rank in ranks), digit)

    @property
    def done(self) -> bool:
        return self.dtype is not None and self.unknown == 0

    def count(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """int64 counts of one block: for each target the elements with its prefix, by the value of the next digit
        (targets * 2**digit of them), then the numbers of float32 and of float64 elements.
        """
        import torch

        places = [(target.source, target.prefix) for target in self.targets]
        counts = {place: self._digit_counts(tensors[place[0]], place[1]) for place in set(places)}
        elements = tensors[0].numel()
        seen = [0, elements] if tensors[0].dtype == torch.float64 else [elements, 0]
        return torch.cat([*(counts[place] for place in places), torch.tensor(seen, device=tensors[0].device)])

    def digits(self) -> tuple[int, int]:
        """What a sweep over float32 counts of a magnitude's bits: those from which place on, and how many values
        these have."""
        unknown, shift = self._unknown_and_shift("float32")
        return shift, 2 ** (unknown - shift)

    def _digit_counts(self, tensor: torch.Tensor, prefix: int) -> torch.Tensor:
        import torch

        dtype = self.dtype or ("float64" if tensor.dtype == torch.float64 else "float32")
        unknown, shift = self._unknown_and_shift(dtype)
        bits = tensor.to(getattr(torch, dtype)).reshape(-1).view(getattr(torch, _INTEGER[dtype]))
        keys = bits.bitwise_and(2 ** _MAGNITUDE_BITS[dtype] - 1)
        keys.bitwise_right_shift_(shift)
        size = 2 ** (unknown - shift)
        if unknown < _MAGNITUDE_BITS[dtype]:
            keys = _below(keys.sub_(prefix >> shift), size)
        return keys.bincount(minlength=size)

    def _unknown_and_shift(self, dtype: Searched) -> tuple[int, int]:
        unknown = _MAGNITUDE_BITS[dtype] if self.dtype is None else self.unknown
        return unknown, max(unknown - self.digit, 0)

    def narrow(self, total: torch.Tensor | NDArray[np.int64]) -> RankSearch:
        """The search one digit further, given the sum of the counts of all blocks."""
        counts = np.asarray(total)
        singles, doubles = counts[-2:].tolist()
        if self.dtype is None and singles and doubles:
            return RankSearch(self.targets, self.digit, "float64", _MAGNITUDE_BITS["float64"])
        dtype: Searched = self.dtype or ("float64" if doubles else "float32")
        _, shift = self._unknown_and_shift(dtype)
        rows = counts[:-2].reshape(len(self.targets), -1)
        targets = tuple(_descend(target, row, shift) for target, row in zip(self.targets, rows, strict=True))
        return RankSearch(targets, self.digit, dtype, shift)

    def supposed(self, elements: int) -> NDArray[np.int64]:
        """A sum of counts as it might be: of zeros alone, in float32."""
        rows = np.zeros((len(self.targets), self.digits()[1]), dtype=np.int64)
        rows[:, 0] = elements
        return np.append(rows, [elements, 0])

    def values(self) -> tuple[float, ...]:
        """The magnitudes found, one for each target, each the value of an element."""
        return tuple(self._value(target.prefix) for target in self.targets)

    def cuts(self) -> tuple[float, ...]:
        """For each target the next smaller number: exactly the elements above it are in the rank or tied with it.

        0 where the magnitude found is 0.
        """
        return tuple(self._value(max(target.prefix - 1, 0)) for target in self.targets)

    def _value(self, pattern: int) -> float:
        assert self.dtype is not None
        return float(np.array(pattern, dtype=_INTEGER[self.dtype]).view(self.dtype))


def _below(keys: torch.Tensor, size: int) -> torch.Tensor:
    """The keys from 0 to size - 1, which are few as a rule."""
    if keys.device.type != "cpu":
        return keys[(keys >= 0) & (keys < size)]
    # On a CPU numpy takes a quarter of torch's time; seen as unsigned, negative keys are large.
    import torch

    array = keys.numpy()
    return torch.from_numpy(np.compress(array.view(f"u{array.itemsize}") < size, array))


def _descend(target: Target, counts: NDArray[np.int64], shift: int) -> Target:
    """Append the digit at which the counts, from the largest digit down, reach the rank."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, target.rank))
    above = int(reached[place - 1]) if place else 0
    digit = counts.size - 1 - place
    return Target(target.source, target.rank - above, target.prefix | (digit << shift))
