"""Random numbers that depend on what they are for, never on how the work was divided.

The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) addressed by counter: word ``j`` of a stream is
``mix(key + j * gamma)``, where the key is a hash of (seed, tensor name, source). Two streams are two stretches of one
cycle of 2**64 words; for tensors of n elements they overlap with probability n / 2**64.
Integer operations alone make the words, so all devices give the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

GAMMA = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
"""SplitMix64's, as unsigned numbers. Machine code (`kernels.native`) makes its words of them too."""

_GAMMA = GAMMA - 2**64
_ROUNDS = tuple((shift, multiplier - 2**64) for shift, multiplier in ROUNDS)
_MANTISSA_BITS = 24
_MANTISSA = 2**_MANTISSA_BITS - 1


class RandomStream:
    """The random numbers of elements ``start`` to ``start + count`` of one tensor.

    Args:
        seed: any integer.
        name: the name of the output tensor.
        start: index of the block's first element in the flattened tensor.
        count: number of elements of the block.
        device: where the numbers are made.
    """

    def __init__(self, seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu") -> None:
        self._seed = seed
        self._name = name
        self._start = start
        self._count = count
        self._device = device

    def uniform(self, source: int) -> torch.Tensor:
        """float32 multiples of 2**-24 in [0, 1), shape (count,), fresh memory, independent between sources."""
        import torch

        key = stream_key(self._seed, self._name, source)
        if torch.device(self._device).type == "cpu":  # numpy takes a third of torch's time
            return torch.from_numpy(_uniform(key, self._start, self._count))
        first, skip = divmod(self._start, 2)
        places = torch.arange(first, first + (skip + self._count + 1) // 2, dtype=torch.int64, device=self._device)
        halves: torch.Tensor = _mixed(places, key).view(torch.int32)[skip : skip + self._count] & _MANTISSA
        return halves.to(torch.float32).mul_(2.0**-_MANTISSA_BITS)


Floats = np.ndarray[Any, np.dtype[np.float32]]


def drawn(seed: int, stream: str, start: int, count: int, distribution: Literal["normal", "uniform"]) -> Floats:
    """float32 numbers, shape (count,): normal with a deviation of 1 (Box and Muller's, of two words for each), or
    uniform in [-1, 1). By numpy, so that a merge that draws needs no torch."""
    first = _uniform(stream_key(seed, stream, 0), start, count)
    if distribution == "uniform":
        return first * np.float32(2) - np.float32(1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - _uniform(stream_key(seed, stream, 1), start, count)))
    numbers: Floats = radius * np.cos(first * np.float32(2 * math.pi))
    return numbers


def _uniform(key: int, start: int, count: int) -> Floats:
    """What ``RandomStream.uniform`` gives."""
    first, skip = divmod(start, 2)
    words = _mixed(np.arange(first, first + (skip + count + 1) // 2, dtype=np.int64), key)
    halves = words.view(np.int32)[skip : skip + count] & _MANTISSA
    numbers: Floats = halves.astype(np.float32) * np.float32(2.0**-_MANTISSA_BITS)
    return numbers


def stream_key(seed: int, name: str, source: int) -> int:
    """What tells the streams apart: 64 bits, as a signed number."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mixed(places: Any, key: int) -> Any:
    """The words at these places of a stream, each for two neighbouring elements: int64 of torch or numpy, in place."""
    words = places
    words *= _GAMMA
    words += key
    for shift, multiplier in _ROUNDS:
        words ^= _shift_right(words, shift)
        words *= multiplier
    words ^= _shift_right(words, LAST_SHIFT)
    return words


def _shift_right(words: Any, distance: int) -> Any:
    """Logical shift: that of signed numbers copies the sign bit."""
    shifted = words >> distance
    shifted &= 2 ** (64 - distance) - 1
    return shifted


def bernoulli(uniform: torch.Tensor, probability: float | torch.Tensor) -> torch.Tensor:
    """1 where ``uniform < probability``, else 0; changes ``uniform`` in place and returns it."""
    return uniform.neg_().add_(probability).sign_().clamp_(min=0)
