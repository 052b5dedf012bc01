"""The recipes of ``recipes/``: each loads, reads back, and runs on small models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.execute.run import run_plan
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.dump import convert_text
from mergekit_px.recipe.load import load_recipe, parse_recipe
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
EXAMPLES = sorted(
    path
    for path in RECIPES.glob("*.y*ml")
    if re.search("^(pxmerge|merge_method):", path.read_text(encoding="utf-8"), re.MULTILINE)
)
"""Those that describe a merge; other commands have files of their own."""
LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``models/base``, ``models/math`` and ``models/code``."""
    folder = tmp_path_factory.mktemp("examples")
    base = tiny_llama_tensors(layers=LAYERS, dtype=torch.bfloat16)
    tensors = {"base": base, "math": fine_tune(base, seed=1, size=0.01), "code": fine_tune(base, seed=2, size=0.01)}
    for name, values in tensors.items():
        write_checkpoint(folder / "models" / name, values, config=tiny_llama_config(layers=LAYERS))
    return folder


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_reads_back(example: Path) -> None:
    loaded = load_recipe(example, methods=method_catalog())
    assert loaded.dialect == ("mergekit" if example.name.startswith("mergekit") else "pxmerge")
    assert parse_recipe(convert_text(loaded), methods=method_catalog()).recipe == loaded.recipe
    if loaded.dialect == "pxmerge":
        modeline, purpose, *_ = example.read_text(encoding="utf-8").splitlines()
        assert modeline == "# yaml-language-server: $schema=../docs/recipe.schema.json"
        assert purpose.startswith("# ") and purpose.endswith(".")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "merged"
    loaded = load_recipe(example, overrides=[f"output.path={out}"], methods=method_catalog())
    run_plan(build_plan(loaded))
    merged = load_file(next(out.glob("*.safetensors")))
    depth = 6 if example.stem == "stack-layers" else LAYERS
    expected = tiny_llama_tensors(layers=depth)
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
