"""The random stream against SplitMix64 written in Python integers, and against statistics."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.kernels.random import RandomStream, bernoulli

MASK = 2**64 - 1


def split_mix(state: int) -> int:
    word = state
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def expected_uniform(seed: int, name: str, source: int, element: int) -> float:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{source}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    word = split_mix((key + (element // 2) * 0x9E3779B97F4A7C15) & MASK)
    half = (word >> 32) if element % 2 else word
    return (half & 0xFFFFFF) / 2**24


def test_the_python_generator_is_split_mix() -> None:
    """The published test vector of the seed 1234567."""
    words = [split_mix((1234567 + step * 0x9E3779B97F4A7C15) & MASK) for step in (1, 2, 3)]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("start", [0, 1, 2**31 - 3, 2**32 - 3, 2**33 + 1, 2**40])
def test_numbers_follow_the_definition(start: int) -> None:
    numbers = RandomStream(5, "model.layers.0.weight", start, 9).uniform(2)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [expected_uniform(5, "model.layers.0.weight", 2, start + i) for i in range(9)]


@given(st.integers(0, 50), st.integers(0, 60))
def test_any_block_holds_the_same_numbers(start: int, count: int) -> None:
    whole = RandomStream(0, "a", 0, 200).uniform(0)
    assert torch.equal(RandomStream(0, "a", start, count).uniform(0), whole[start : start + count])


def test_numbers_are_uniform() -> None:
    numbers = RandomStream(1, "w", 0, 400_000).uniform(0)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1).double()
    chi_square = float(((counts - 4000) ** 2 / 4000).sum())
    assert 50 < chi_square < 170  # 99 degrees of freedom


@pytest.mark.parametrize(
    "other",
    [(1, "w", 1), (2, "w", 0), (1, "v", 0), (1, "w0", 0), (-1, "w", 0)],
    ids=["source", "seed", "name", "longer name", "negative seed"],
)
def test_streams_are_independent(other: tuple[int, str, int]) -> None:
    count = 200_000
    first = RandomStream(1, "w", 0, count).uniform(0).double() - 0.5
    second = RandomStream(other[0], other[1], 0, count).uniform(other[2]).double() - 0.5
    for lag in (0, 1, 2, 64):
        correlation = float((first[lag:] * second[: count - lag]).mean()) * 12
        assert abs(correlation) < 5 / count**0.5
    pairs = torch.histc((first + 0.5) * 8 // 1 * 8 + (second + 0.5) * 8 // 1, bins=64, min=0, max=64).double()
    assert 25 < float(((pairs - count / 64) ** 2 / (count / 64)).sum()) < 120  # 63 degrees of freedom


def test_neighbouring_elements_are_independent() -> None:
    numbers = RandomStream(3, "w", 0, 200_001).uniform(0).double() - 0.5
    for lag in (1, 2, 3, 2048):
        assert abs(float((numbers[lag:] * numbers[:-lag]).mean()) * 12) < 5 / 200_000**0.5


def test_one_bit_of_the_index_changes_half_of_the_bits() -> None:
    for bit in range(1, 45):
        first = torch.cat([RandomStream(0, "w", 4096 * i, 1).uniform(0) for i in range(40)])
        second = torch.cat([RandomStream(0, "w", 4096 * i ^ (1 << bit), 1).uniform(0) for i in range(40)])
        changed = (first * 2**24).long() ^ (second * 2**24).long()
        share = sum(int(value).bit_count() for value in changed.tolist()) / (40 * 24)
        assert 0.4 < share < 0.6


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.999])
def test_bernoulli_is_one_where_the_number_is_below(probability: float) -> None:
    numbers = RandomStream(0, "w", 0, 100_000).uniform(0)
    kept = bernoulli(numbers.clone(), probability)
    assert torch.equal(kept, (numbers < torch.tensor(probability)).float())


def test_bernoulli_takes_a_probability_for_each_element() -> None:
    numbers = RandomStream(0, "w", 0, 1000).uniform(0)
    probabilities = torch.linspace(0, 1, 1000)
    assert torch.equal(bernoulli(numbers.clone(), probabilities), (numbers < probabilities).float())
