from __future__ import annotations

import json

import torch


def test_suggestions_come_from_headers(place) -> None:
    folder = place.checkpoint("big", "wide", torch.bfloat16)
    place.plan["models"] = {"wide": {"weights": str(folder)}, "kernels": {"model": "nets.py:kernels"}}
    place.plan.pop("transfer")
    found = json.loads(place.run("--json", verb="pairs").stdout)
    assert found["kernels"] == [
        {"name": "conv.weight", "shape": [4, 1, 3, 3], "matrix": [4, 9], "rank": 1},
        {"name": "deep.weight", "shape": [6, 4, 3, 3], "matrix": [6, 36], "rank": 1},
        {"name": "head.weight", "shape": [3, 24], "matrix": [3, 24], "rank": 1},
    ]
    assert [one["name"] for one in found["wide"]] == ["first.weight", "second.weight", "unused.weight"]
