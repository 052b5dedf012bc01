"""Fingerprints tell models apart and not their packaging; task vectors say what they are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import MemoryReader, checkpoint_from_state_dict, open_reader
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector, task_vector_metadata


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "w": torch.randn(64, 32),
        "b": torch.randn(3),
        "n": torch.ones(100, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
    }


def of_memory(tensors) -> str:
    return fingerprint(checkpoint_from_state_dict("m", tensors), MemoryReader(tensors))


def of_folder(folder) -> str:
    checkpoint = open_checkpoint(folder)
    reader = open_reader(checkpoint)
    found = fingerprint(checkpoint, reader)
    reader.close()
    return found


def test_packaging_does_not_matter(tmp_path, tensors) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / "many" / f"{name}.safetensors")
    expected = of_folder(tmp_path / "one")
    assert len(expected) == 64
    assert of_folder(tmp_path / "many") == of_memory(dict(reversed(tensors.items()))) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(b=t["b"] + 1),
        lambda t: t["w"].view(-1)[0].add_(1),
        lambda t: t["w"].view(-1)[-1].add_(1),
        lambda t: t["w"].mul_(1.001),
        lambda t: t.update(w=t["w"].reshape(32, 64)),
        lambda t: t.update(n=t["n"].half()),
        lambda t: t.pop("empty"),
        lambda t: t.update(v=t.pop("w")),
    ],
    ids=["small tensor", "first", "last", "all a little", "shape", "dtype", "missing", "name"],
)
def test_what_does_matter(tensors, change) -> None:
    before = of_memory(tensors)
    change(tensors)
    assert of_memory(tensors) != before


def test_task_vectors_say_so(tmp_path, tensors) -> None:
    save_file(tensors, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    save_file(tensors, tmp_path / "delta.safetensors", metadata={"format": "pt", **task_vector_metadata("ab" * 32)})
    save_file(tensors, tmp_path / "free.safetensors", metadata=task_vector_metadata(None))
    plain, delta, free = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("plain", "delta", "free"))
    assert not is_task_vector(plain) and base_fingerprint(plain) is None
    assert is_task_vector(delta) and base_fingerprint(delta) == "ab" * 32
    assert is_task_vector(free) and base_fingerprint(free) is None
