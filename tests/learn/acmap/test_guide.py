"""The commands of docs/learn-acmap.md work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from mergekit_px.cli import main

GUIDE = Path(__file__).parents[3] / "docs" / "learn-acmap.md"


def test_the_commands_of_the_guide_run(
    problem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(problem.folder)
    (problem.folder / "tiny.py").rename("vit.py")
    for task in (1, 2):
        save_file(problem.adapters[task - 1], f"adapter{task}.safetensors")
        Path(problem.write_data(task)).rename(f"task{task}.npz")
    x = np.concatenate(problem.inputs[:2]).astype(np.float32)
    np.savez("test.npz", x=x, labels=np.concatenate(problem.labels[:2]))
    text = GUIDE.read_text()
    lines = re.findall(r"^    pxmerge (.*)$", text, re.MULTILINE) + re.findall(r"`pxmerge (acmap export [^`]*)`", text)
    assert len(lines) == 9
    for line in lines:
        assert main(shlex.split(line)) == 0, (line, capsys.readouterr().err)
    for file in ("prototypes.safetensors", "prototypes.json", "predictions.npz", "head.safetensors"):
        assert Path(file).is_file(), file


def test_the_guide_names_only_pages_that_are_there() -> None:
    pages = re.findall(r"\]\(([\w-]+\.md)(?:#[\w-]+)?\)", GUIDE.read_text())
    assert pages and all((GUIDE.parent / page).is_file() for page in pages)
