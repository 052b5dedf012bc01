"""Gathered rows against numpy, whole and in pieces, and inside a merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import PlanError
from mergekit_px.execute.views import ViewValues
from mergekit_px.plan.nodes import Read, Rows
from mergekit_px.testing.checkpoints import write_checkpoint


@pytest.fixture
def embedding(tmp_path: Path) -> tuple[Read, ViewValues, torch.Tensor]:
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", {"embed.weight": table}))
    read = Read("a", checkpoint.tensors["embed.weight"], (300, 16), "weights")
    values = ViewValues({"a": open_reader(checkpoint)}, lambda node: {}, 0, torch.float32)
    return read, values, table.float()


def test_rows_are_gathered_and_absent_ones_are_zero(embedding: tuple[Read, ViewValues, torch.Tensor]) -> None:
    read, values, table = embedding
    index = np.random.default_rng(1).integers(-1, 300, 400)
    node = Rows(read, index)
    expected = np.where(index[:, None] < 0, 0, table.numpy()[index])
    assert node.shape == (400, 16) and node.dtype.name == "BF16"
    whole = values.values(node)(0, 400 * 16)
    np.testing.assert_array_equal(whole.view(400, 16).numpy(), expected)
    pieces = [values.values(node)(start, min(start + 1000, 6400)) for start in range(0, 6400, 1000)]
    np.testing.assert_array_equal(torch.cat(pieces).numpy(), expected.reshape(-1))


def test_rows_of_rows(embedding: tuple[Read, ViewValues, torch.Tensor]) -> None:
    read, values, table = embedding
    order = np.random.default_rng(2).permutation(300)
    back = Rows(Rows(read, order), np.argsort(order))
    np.testing.assert_array_equal(values.values(back)(0, 4800).view(300, 16).numpy(), table.numpy())


@pytest.mark.parametrize("index", [[300], [-2], [[0]]])
def test_an_index_outside_is_refused(embedding: tuple[Read, ViewValues, torch.Tensor], index: list[int]) -> None:
    with pytest.raises(PlanError, match="does not fit"):
        Rows(embedding[0], np.array(index))
