"""A quantised checkpoint merged with itself, so that the result is what its tensors stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping

W = "model.layers.0.mlp.up_proj.weight"


def of_module(stored: Mapping[str, torch.Tensor], name: str = W) -> dict[str, torch.Tensor]:
    """Stored tensors by full names; ``!`` starts what takes the place of the name's ``weight``."""
    return {
        name.removesuffix("weight") + end[1:] if end.startswith("!") else name + end: each
        for end, each in stored.items()
    }


def merged(
    tmp_path: Path, stored: Mapping[str, torch.Tensor], config: Any = None, **files: Any
) -> dict[str, torch.Tensor]:
    """The tensors alone, averaged with themselves under a second name, as float32.

    Args:
        files: JSON files beside the weights, by their names without an ending.
    """
    folder = tmp_path / "quantised"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    files |= {} if config is None else {"config": config}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    second = folder if files else folder / "model.safetensors"
    recipe = {
        "models": {"a": str(folder), "b": str(second)},
        "merge": {"method": "linear", "sources": ["a", "b"]},
        "output": {"path": str(tmp_path / "out"), "dtype": "float32"},
    }
    plan = build_plan(recipe_from_mapping(recipe), PlanOptions(memory=400_000_000))
    assert any("decoded on reading" in note for note in plan.notes)
    run_plan(plan)
    return load_file(tmp_path / "out" / "model.safetensors")


def check(found: torch.Tensor, values: Any) -> None:
    np.testing.assert_allclose(found.numpy(), np.asarray(values, dtype=np.float32), rtol=2e-7, atol=0)
