"""The commands and the recipe of docs/average.md work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from mergekit_px.cli import main
from mergekit_px.recipe.decay import run_weights
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

GUIDE = (Path(__file__).parents[2] / "docs" / "average.md").read_text()


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama_tensors(layers=1, dtype=torch.bfloat16)
    write_checkpoint(Path("base"), base, config=tiny_llama_config(layers=1))
    for step in range(100, 600, 100):
        write_checkpoint(
            Path(f"run/checkpoint-{step}"), fine_tune(base, step, size=0.01), config=tiny_llama_config(layers=1)
        )
    lines = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "pxmerge"
        assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    for folder in ("averaged", "decayed", "windows/steps-300-500", "newest"):
        assert Path(folder, "model.safetensors").is_file(), folder
    (recipe,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    Path("recipe.yaml").write_text(recipe)
    assert main(["run", "recipe.yaml", "-o", "merged"]) == 0, capsys.readouterr().err


def test_the_weights_of_the_guide_are_those_that_are_used() -> None:
    rows = re.findall(r"^\| `(\S+?)`.*\| ([\d., ]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 4
    for word, numbers in rows:
        weights = run_weights([word], 4)
        shares = [weight / sum(weights) for weight in weights]
        assert [float(number) for number in numbers.split(", ")] == pytest.approx(shares, abs=6e-4)
