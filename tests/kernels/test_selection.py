"""Rank searches against numpy's partition, on kind and on adversarial data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mergekit_px.kernels.selection import RankSearch


def search(blocks: Sequence[Sequence[torch.Tensor]], ranks: Sequence[tuple[int, int]]) -> RankSearch:
    found = RankSearch.start(ranks, sum(block[0].numel() for block in blocks))
    sweeps = 0
    while not found.done:
        total = sum(found.count(block) for block in blocks)
        assert isinstance(total, torch.Tensor)
        found = found.narrow(total)
        sweeps += 1
        assert sweeps <= 7
    return found


def expected(array: np.ndarray, rank: int) -> float:
    magnitudes = np.abs(array.reshape(-1))
    place = magnitudes.size - rank
    return float(np.partition(magnitudes, place)[place])


def distributions(count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    mostly_zero = normal.clone()
    mostly_zero[torch.rand(count, generator=generator) < 0.9] = 0.0
    tiny = torch.finfo(dtype).tiny
    base = normal * 0.02
    return {
        "normal": normal.to(dtype),
        "all equal": torch.full((count,), -0.3, dtype=dtype),
        "all zero": torch.zeros(count, dtype=dtype),
        "negative zero": -torch.zeros(count, dtype=dtype),
        "mostly zero": mostly_zero.to(dtype),
        "two values": torch.where(normal > 0, 1.0, -1.0000001).to(dtype),
        "subnormal": (normal * tiny / 64).to(dtype),
        "every magnitude": (normal * torch.exp(30 * torch.sin(100 * normal))).to(dtype),
        "quantised": ((base + normal.flip(0) * 1e-4).bfloat16().to(dtype) - base.bfloat16().to(dtype)),
        "neighbours": torch.nextafter(torch.ones(count, dtype=dtype), torch.tensor(2, dtype=dtype)).where(
            normal > 1, torch.ones(count, dtype=dtype)
        ),
        "extreme": torch.finfo(dtype).max * normal.sign().to(dtype),
        "infinite": torch.full((count,), float("inf"), dtype=dtype).where(normal > 0.5, normal.to(dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1000, 70_000])
@pytest.mark.parametrize("kind", sorted(distributions(1, torch.float32)))
def test_every_distribution(kind: str, count: int, dtype: torch.dtype) -> None:
    data = distributions(count, dtype)[kind]
    blocks = [(part,) for part in data.split(9000)]
    ranks = [1, 2, count // 5, count // 2, count - 1, count]
    found = search(blocks, [(0, rank) for rank in ranks])
    for rank, value, cut in zip(ranks, found.values(), found.cuts(), strict=True):
        assert value == expected(data.numpy(), rank)
        if value:
            assert torch.equal(data.abs() > cut, data.abs() >= value)
        else:
            assert cut == 0


@settings(deadline=None)
@given(
    npst.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False)),
    st.data(),
)
def test_any_data_and_any_cut(array: np.ndarray, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, array.size))
    step = data.draw(st.integers(1, array.size))
    blocks = [(part,) for part in torch.from_numpy(array.copy()).split(step)]
    assert search(blocks, [(0, rank)]).values() == (expected(array, rank),)


def test_sources_are_searched_together() -> None:
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(5000, generator=generator) * 10.0**-i for i in range(3)]
    ranks = [(2, 10), (0, 4000), (1, 1), (0, 7)]
    found = search([sources], ranks)
    assert found.values() == tuple(expected(sources[source].numpy(), rank) for source, rank in ranks)


def test_blocks_of_both_dtypes_are_compared_as_float64() -> None:
    generator = torch.Generator().manual_seed(2)
    single = torch.randn(3000, generator=generator)
    double = single.double() * (1 + 1e-12)
    together = torch.cat([single.double(), double]).numpy()
    for rank in (1, 2, 3, 1500, 5999, 6000):
        assert search([(single,), (double,)], [(0, rank)]).values() == (expected(together, rank),)


def test_blocks_keep_their_shape_and_content() -> None:
    block = torch.randn(6, 5)
    before = block.clone()
    assert search([(block,)], [(0, 3)]).values() == (expected(block.numpy(), 3),)
    assert torch.equal(block, before)


def test_empty_blocks_do_no_harm() -> None:
    assert search([(torch.empty(0),), (torch.tensor([3.0, -4.0]),)], [(0, 1)]).values() == (4.0,)


@pytest.mark.parametrize(("elements", "sweeps"), [(100, 3), (2**17, 2)])
def test_sweeps(elements: int, sweeps: int) -> None:
    block = (torch.linspace(-1, 1, elements),)
    found = RankSearch.start([(0, 5)], elements)
    for _ in range(sweeps):
        assert not found.done
        found = found.narrow(found.count(block))
    assert found.done


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_does_not_exist(rank: int) -> None:
    with pytest.raises(ValueError, match="no rank"):
        RankSearch.start([(0, rank)], 4)
