"""The commands of docs/spectral.md work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mergekit_px.cli import main
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

GUIDE = Path(__file__).parents[2] / "docs" / "spectral.md"


def test_the_commands_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama_tensors(layers=1)
    write_checkpoint("base", base, config=tiny_llama_config(layers=1))
    for seed, name in enumerate(("math", "code", "law")):
        write_checkpoint(name, fine_tune(base, seed), config=tiny_llama_config(layers=1))
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    assert len(lines) == 10
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "pxmerge"
        assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    for file in ("merged/model.safetensors", "pool/pool.json", "adapter/adapter_config.json", "report.png"):
        assert Path(file).is_file(), file


def test_the_guide_names_only_pages_that_are_there() -> None:
    pages = re.findall(r"\]\(([\w-]+\.md)\)", GUIDE.read_text())
    assert pages and all((GUIDE.parent / page).is_file() for page in pages)
