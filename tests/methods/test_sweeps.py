"""Methods sweep a tensor only if their parameters call for it, and no more often than that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Extent, Operands


def sweeps(method: str, params: dict[str, Any], elements: int = 2**17) -> int:
    declared = find_method(method)
    assert declared.statistics is not None
    resolved = declared.params.model_validate(params)
    sources = [torch.linspace(-1, 1 + i, elements) for i in range(2)]
    operands = Operands(tensors=sources, weights=(1.0, 1.0), params=resolved)
    generator = declared.statistics(Extent(sources=2, elements=elements, weights=(1.0, 1.0), params=resolved))
    count = 0
    try:
        sweep = next(generator)
        while True:
            count += 1
            sweep = generator.send(sweep(operands))
    except StopIteration:
        return count


@pytest.mark.parametrize(
    ("method", "params", "expected"),
    [
        ("slerp", {"t": 0}, 0),
        ("slerp", {"t": 1}, 0),
        ("slerp", {}, 1),
        ("ties", {"density": 1.0}, 0),
        ("ties", {"density": 0.0}, 0),
        ("ties", {"density": 1.0, "rescale": "l1"}, 0),
        ("ties", {}, 2),
        ("ties", {"density": [0.5, 1.0], "rescale": "l1"}, 3),
        ("dare_linear", {}, 0),
        ("dare_ties", {"rescale": "none"}, 0),
        ("breadcrumbs", {"density": 1.0}, 0),
        ("breadcrumbs", {}, 2),
        ("sce", {"select": 1.0}, 1),
        ("sce", {}, 3),
        ("model_stock", {}, 1),
        ("karcher", {}, 1),
        ("nuslerp", {}, 1),
        ("nuslerp", {"along": "rows"}, 0),
        ("model_stock", {"along": "rows"}, 0),
        ("della", {}, 0),
        ("ram_plus", {}, 1),
        ("multislerp", {}, 1),
    ],
)
def test_the_number_of_sweeps(method: str, params: dict[str, Any], expected: int) -> None:
    assert sweeps(method, params) == expected


def test_small_tensors_need_no_large_histograms() -> None:
    assert sweeps("ties", {}, elements=500) == 3
