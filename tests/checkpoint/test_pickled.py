"""PyTorch pickles: refused unless allowed, never executed, and then read like any other file."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
TENSORS["tied"] = TENSORS["w"]
TENSORS["turned"] = TENSORS["w"].T


def contents(checkpoint) -> dict[str, bytes]:
    reader = open_reader(checkpoint)
    found = {}
    for name, stored in checkpoint.tensors.items():
        buffer = bytearray(stored.nbytes)
        reader.read_into(stored, 0, memoryview(buffer))
        found[name] = bytes(buffer)
    reader.close()
    return found


EXPECTED = {name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in TENSORS.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "adapter_model.bin"])
def test_folder_and_file(tmp_path, name) -> None:
    torch.save(TENSORS, tmp_path / name)
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=f"{name} is a PyTorch pickle.*--allow-pickle"):
            open_checkpoint(place)
        checkpoint = open_checkpoint(place, allow_pickle=True)
        assert checkpoint.kind == "pickle" and checkpoint.tensors["turned"].shape == (4, 3)
        assert contents(checkpoint) == EXPECTED
    assert open_checkpoint(tmp_path, allow_pickle=True).config == {}


def test_sharded(tmp_path) -> None:
    torch.save({"w": TENSORS["w"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": TENSORS["b"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"w": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    assert contents(open_checkpoint(tmp_path, allow_pickle=True)) == {key: EXPECTED[key] for key in ("w", "b")}
    index.write_text(json.dumps({"weight_map": weight_map | {"c": weight_map["w"]}}))
    with pytest.raises(MalformedCheckpointError, match="places c in"):
        open_checkpoint(tmp_path, allow_pickle=True)
    index.write_text(json.dumps({"weight_map": weight_map | {"c": "gone.bin"}}))
    with pytest.raises(MalformedCheckpointError, match=r"gone\.bin"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_safetensors_come_first(tmp_path) -> None:
    from safetensors.torch import save_file

    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    save_file({"b": TENSORS["b"]}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path, allow_pickle=True).files) == ["model.safetensors"]


def test_old_format_and_wrapped_state_dicts(tmp_path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert contents(open_checkpoint(tmp_path / "a.pt", allow_pickle=True)) == EXPECTED


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch " + os.environ["PXMERGE_TEST_MARK"],))


def test_code_is_not_run(tmp_path, monkeypatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("PXMERGE_TEST_MARK", str(mark))
    for name, write in [("a.bin", pickle.dumps), ("b.bin", None)]:
        if write:
            (tmp_path / name).write_bytes(write({"w": Hostile()}))
        else:
            torch.save({"w": Hostile()}, tmp_path / name)
        with pytest.raises(MalformedCheckpointError, match=rf"^{tmp_path / name}: .*never code"):
            open_checkpoint(tmp_path / name, allow_pickle=True)
    assert not mark.exists()


def test_what_is_not_a_state_dict(tmp_path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(MalformedCheckpointError, match="holds a list"):
        open_checkpoint(tmp_path / "list.pt", allow_pickle=True)
    torch.save({"w": 1}, tmp_path / "number.pt")
    with pytest.raises(InputError, match="w holds a int, not a tensor"):
        open_checkpoint(tmp_path / "number.pt", allow_pickle=True)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(MalformedCheckpointError, match="not a plain PyTorch weight file"):
        open_checkpoint(tmp_path / "text.pt", allow_pickle=True)
    with pytest.raises(InputError, match="holds 3 PyTorch pickles"):
        open_checkpoint(tmp_path, allow_pickle=True)
    (tmp_path / "empty").mkdir()
    torch.save({}, tmp_path / "empty" / "optimizer.pt")
    with pytest.raises(InputNotFoundError, match="holds no weights"):
        open_checkpoint(tmp_path / "empty", allow_pickle=True)
