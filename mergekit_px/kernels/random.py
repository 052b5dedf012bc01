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

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_LAST_SHIFT = 31
_MANTISSA_BITS = 24


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

        first, skip = divmod(self._start, 2)
        words = self._words(source, first, (skip + self._count + 1) // 2)
        halves = words.view(torch.int32)[skip : skip + self._count]
        return halves.bitwise_and(2**_MANTISSA_BITS - 1).to(torch.float32).mul_(2.0**-_MANTISSA_BITS)

    def _words(self, source: int, first: int, count: int) -> torch.Tensor:
        """int64, shape (count,): each word serves two neighbouring elements."""
        import torch

        key = stream_key(self._seed, self._name, source)
        words = torch.arange(first, first + count, dtype=torch.int64, device=self._device).mul_(_GAMMA).add_(key)
        for shift, multiplier in _ROUNDS:
            words.bitwise_xor_(_shift_right(words, shift)).mul_(multiplier)
        return words.bitwise_xor_(_shift_right(words, _LAST_SHIFT))


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
    words = np.arange(first, first + (skip + count + 1) // 2, dtype=np.int64).view(np.uint64)
    words = words * np.uint64(_GAMMA % 2**64) + np.uint64(key % 2**64)
    for shift, multiplier in _ROUNDS:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier % 2**64)
    words ^= words >> np.uint64(_LAST_SHIFT)
    halves = words.view(np.uint32)[skip : skip + count] & np.uint32(2**_MANTISSA_BITS - 1)
    numbers: Floats = halves.astype(np.float32) * np.float32(2.0**-_MANTISSA_BITS)
    return numbers


def stream_key(seed: int, name: str, source: int) -> int:
    """What tells the streams apart: 64 bits, as a signed number."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(words: torch.Tensor, distance: int) -> torch.Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return words.bitwise_right_shift(distance).bitwise_and_(2 ** (64 - distance) - 1)


def bernoulli(uniform: torch.Tensor, probability: float | torch.Tensor) -> torch.Tensor:
    """1 where ``uniform < probability``, else 0; changes ``uniform`` in place and returns it."""
    return uniform.neg_().add_(probability).sign_().clamp_(min=0)
