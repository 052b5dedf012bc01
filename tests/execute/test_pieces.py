"""Pieces of files: the same numbers and the same errors whoever reads them, with few files open, and all counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px import merge
from mergekit_px.checkpoint import positional
from mergekit_px.checkpoint.reader import FileReader
from mergekit_px.cli.app import main
from mergekit_px.errors import InputError
from mergekit_px.execute import pieces as module
from mergekit_px.kernels import native, native_loop
from mergekit_px.stages import measured

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no llvmlite, or no fused multiply-add")

# Around the ends of vectors, of pieces, and of the first chunk.
SIZES = (1, 15, 16, 17, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, (1 << 20) + 3, (1 << 20) + (1 << 16) + 5)


def _models(folder: Path, count: int, dtypes: list[torch.dtype]) -> list[str]:
    generator = torch.Generator().manual_seed(count)
    for number in range(count):
        state = {str(size): torch.randn(size, generator=generator) for size in SIZES}
        state = {name: value.to(dtypes[number % len(dtypes)]) for name, value in state.items()}
        (folder / str(number)).mkdir()
        save_file(state, folder / str(number) / "model.safetensors")
    return [str(folder / str(number)) for number in range(count)]


@pytest.fixture
def by_machine(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the loop was to read from files."""
    calls: list[bool] = []
    loop = native_loop.native_loop()

    def told(sources: int, count: int, *others: Any) -> int:
        table = np.ctypeslib.as_array((native_loop.ctypes.c_int64 * (4 * count)).from_address(sources))
        calls.append(bool((table[::4] >= 0).any()))
        return loop(sources, count, *others)

    monkeypatch.setattr(module, "native_loop", lambda: told)
    return calls


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear"])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float32, torch.float16]])
def test_machine_and_readers_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_machine: list[bool], method: str, dtypes: list[torch.dtype]
) -> None:
    base, *sources = _models(tmp_path, 3, dtypes)
    options: dict[str, Any] = {"base": base} if method in ("ties", "dare_linear") else {}
    merge(sources, method, output=str(tmp_path / "by machine"), **options)
    assert by_machine
    assert all(by_machine)
    by_machine.clear()
    monkeypatch.setenv(positional.PORTABLE_VARIABLE, "1")
    merge(sources, method, output=str(tmp_path / "by readers"), **options)
    assert by_machine
    assert not any(by_machine)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("by machine", "by readers"))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].view(torch.uint8).equal(second[name].view(torch.uint8)), name


def test_several_outputs_are_computed_on_one_reading(tmp_path: Path, by_machine: list[bool]) -> None:
    models = _models(tmp_path, 3, [torch.bfloat16])
    states = [load_file(Path(model) / "model.safetensors") for model in models]
    assert main(["average", *models, "--window", "2", "--stride", "1", "-o", str(tmp_path / "out"), "-q"]) == 0
    assert by_machine
    assert all(by_machine)
    folders = sorted(path.parent for path in (tmp_path / "out").rglob("model.safetensors"))
    assert len(folders) == 2
    for folder, pair in zip(folders, (states[:2], states[1:]), strict=True):
        for name, value in load_file(folder / "model.safetensors").items():
            assert value.equal(((pair[0][name].float() + pair[1][name].float()) / 2).bfloat16()), (folder, name)


def test_bytes_are_counted_as_readers_count_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _models(tmp_path, 2, [torch.bfloat16])
    read: list[int] = []
    close = FileReader.close

    def closed(self: FileReader) -> None:
        read.extend(self.bytes_read.values())
        close(self)

    monkeypatch.setattr(FileReader, "close", closed)
    merge(models, "linear", output=str(tmp_path / "out"))
    assert read == [2 * sum(SIZES)] * 2


def test_few_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_machine: list[bool]) -> None:
    models = _models(tmp_path, 4, [torch.bfloat16])
    merge(models, "linear", output=str(tmp_path / "many"))
    by_machine.clear()
    monkeypatch.setattr(module, "files_at_once", lambda: 4)
    merge(models, "linear", output=str(tmp_path / "few"), threads=2)
    assert by_machine
    assert not any(by_machine)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("many", "few")]
    assert files[0] == files[1]


def test_a_file_that_ends_early_is_told_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _models(tmp_path, 2, [torch.bfloat16])
    path = Path(models[1]) / "model.safetensors"
    whole = path.read_bytes()
    opened = FileReader._open

    def cut_once_open(self: FileReader, name: str) -> Any:
        file = opened(self, name)
        if self._directory == path.parent:
            os.truncate(path, len(whole) - 100)
        return file

    monkeypatch.setattr(FileReader, "_open", cut_once_open)
    messages = []
    for place in ("by machine", "by readers"):
        path.write_bytes(whole)
        with pytest.raises(InputError, match="the file ends 98 bytes early") as caught:
            merge(models, "linear", output=str(tmp_path / place))
        messages.append(str(caught.value))
        assert not (tmp_path / place / "model.safetensors").exists()
        monkeypatch.setattr(positional._PreadFile, "descriptor", None)
    assert messages[0] == messages[1]


def test_times_of_reading_are_told_apart(tmp_path: Path) -> None:
    models = _models(tmp_path, 2, [torch.bfloat16])
    with measured() as stages:
        merge(models, "linear", output=str(tmp_path / "out"))
    seconds = {row.stage: row.processor for row in stages.rows()}
    assert seconds["read"] > 0
    assert seconds["arithmetic"] > 0
