"""Small checkpoints and plans for the tests of plan and execute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]


def make_models(
    folder: Path, *, count: int = 3, layers: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensors]:
    """``base`` and ``fine0``, ``fine1``, ... under ``folder``; returns their tensors."""
    base = tiny_llama_tensors(layers=layers, dtype=dtype)
    models = {"base": base, **{f"fine{n}": fine_tune(base, seed=n + 1, size=0.01) for n in range(count)}}
    for name, tensors in models.items():
        write_checkpoint(folder / name, tensors, config=tiny_llama_config(layers=layers))
    return models


def recipe(
    folder: Path, step: Mapping[str, Any], output: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A recipe of one step over every model folder under ``folder``."""
    models = {path.parent.name: str(path.parent) for path in sorted(folder.glob("*/*.safetensors"))}
    return {"pxmerge": 1, "models": models, "merge": dict(step), "output": dict(output or {}), **more}


def plan_of(data: Mapping[str, Any], output: Path, **options: Any) -> Plan:
    return build_plan(recipe_from_mapping(data), PlanOptions(output=output, **options))


def merge(data: Mapping[str, Any], output: Path, **options: Any) -> Tensors:
    """Run a recipe and load what it wrote."""
    run_plan(plan_of(data, output, **options))
    found: Tensors = {}
    for file in sorted(output.glob("*.safetensors")):
        found.update(load_file(file))
    return found
