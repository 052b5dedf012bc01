from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import MemoryReader, open_reader
from mergekit_px.checkpoint.whole import read_bytes, read_elements, read_tensors
from mergekit_px.errors import InputError


def test_tensors_come_as_they_are_stored(tmp_path: Path) -> None:
    stored = {
        "matrix": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(7),
    }
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    found = read_tensors(checkpoint)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in stored.items()
    }
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert list(read_tensors(checkpoint, ["one"])) == ["one"]
    memory = torch.full((8,), 255, dtype=torch.uint8)
    with closing(open_reader(checkpoint)) as reader:
        matrix = checkpoint.tensors["matrix"]
        assert read_elements(reader, matrix, slice(2, 4), memory).tolist() == [2, 3]
        assert memory[4:].tolist() == [255] * 4
        assert read_bytes(reader, matrix) == stored["matrix"].view(torch.uint8).numpy().tobytes()


def test_packed_values_are_refused() -> None:
    stored = StoredTensor("codes", parse_dtype("F4"), (4,), "file", 0, 2)
    with pytest.raises(InputError, match="codes is packed F4"):
        read_elements(MemoryReader({"codes": torch.zeros(2, dtype=torch.uint8)}), stored, slice(0, 4))
