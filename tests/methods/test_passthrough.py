"""``passthrough`` copies, or scales."""

from __future__ import annotations

import pytest
import torch

from mergekit_px.errors import UsageError
from mergekit_px.testing import apply_method, check_method


def test_conformance() -> None:
    check_method("passthrough", identity=True)
    check_method("passthrough", {"scale": -0.3})


def test_a_copy_has_the_same_bits() -> None:
    source = torch.tensor([-0.0, 0.0, 1e-45, -1e38])
    assert torch.equal(apply_method("passthrough", [source]).view(torch.int32), source.view(torch.int32))


def test_scale() -> None:
    assert apply_method("passthrough", [torch.tensor([1.0, -2.0])], params={"scale": 0.5}).tolist() == [0.5, -1.0]


def test_it_takes_one_source() -> None:
    with pytest.raises(UsageError, match="exactly 1 source, 2 given"):
        apply_method("passthrough", [torch.zeros(1)] * 2)
