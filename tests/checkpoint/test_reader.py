"""Ranged reads give the bytes of the tensor, from any thread, in both ways of reading."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.checkpoint import file_pool, positional
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import FileReader, MemoryReader, checkpoint_from_state_dict, open_reader
from mergekit_px.errors import InputError, InputNotFoundError

BOTH_WAYS = pytest.mark.parametrize("portable", [False, True], ids=["pread", "portable"])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "w": torch.randn(300, 7),
        "half": torch.randn(33).bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "fp8": torch.randn(64).to(torch.float8_e4m3fn),
        "fp4": torch.randint(0, 256, (3, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "flag": torch.tensor([True, False]),
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@BOTH_WAYS
def test_any_range_from_any_thread(tmp_path, tensors, portable) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    reader = open_reader(checkpoint, portable=portable)
    order = random.Random(0)

    def read(_: int) -> bool:
        stored = checkpoint.tensors[order.choice(list(tensors))]
        start = order.randint(0, stored.nbytes)
        stop = order.randint(start, stored.nbytes)
        buffer = bytearray(stop - start)
        reader.read_into(stored, start, memoryview(buffer))
        return bytes(buffer) == raw(tensors[stored.name])[start:stop]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(400)))
    reader.close()
    reader.close()


@BOTH_WAYS
def test_more_files_than_may_be_open(tmp_path, monkeypatch, portable) -> None:
    monkeypatch.setattr(file_pool, "_OPEN_FILES", 3)
    for number in range(12):
        save_file({f"t{number}": torch.full((50,), float(number))}, tmp_path / f"{number}.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    opened = []
    original = positional.open_positional

    def counting(path, **arguments):
        file = original(path, **arguments)
        opened.append(file)
        return file

    monkeypatch.setattr("mergekit_px.checkpoint.ranged.open_positional", counting)
    reader = FileReader(checkpoint, portable=portable)

    def read(number: int) -> bool:
        buffer = bytearray(200)
        reader.read_into(checkpoint.tensors[f"t{number % 12}"], 0, memoryview(buffer))
        return bytes(buffer) == raw(torch.full((50,), float(number % 12)))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(120)))
    assert len(opened) >= 12
    assert len(reader._pool._files) <= 4 + 3
    reader.close()


def test_reads_are_continued_where_the_system_returns_less(tmp_path, monkeypatch, tensors) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(positional, "_LARGEST_CALL", 100)
    checkpoint = open_checkpoint(tmp_path)
    for portable in (False, True):
        buffer = memoryview(bytearray(8400)).cast("f")
        reader = open_reader(checkpoint, portable=portable)
        reader.read_into(checkpoint.tensors["w"], 0, buffer)
        reader.close()
        assert buffer.tobytes() == raw(tensors["w"])


@BOTH_WAYS
def test_errors_name_file_and_tensor(tmp_path, tensors, portable) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(tmp_path)
    stored = checkpoint.tensors["w"]
    reader = FileReader(checkpoint, portable=portable)
    buffer = memoryview(bytearray(stored.nbytes))
    with pytest.raises(InputError, match=r"model\.safetensors: w: bytes 1 to 8401 asked of 8400"):
        reader.read_into(stored, 1, buffer)
    reader.read_into(stored, 0, buffer)
    whole = path.read_bytes()
    path.write_bytes(whole[: stored.offset + 100])
    with pytest.raises(InputError, match=r"model\.safetensors: w: the file ends 8300 bytes early; it changed"):
        reader.read_into(stored, 0, buffer)
    reader.close()
    with pytest.raises(InputError, match="the file changed since its header was read"):
        reader.read_into(stored, 0, buffer)
    path.unlink()
    with pytest.raises(InputNotFoundError, match="gone since its header was read"):
        reader.read_into(stored, 0, buffer)


def test_the_environment_forces_the_portable_way(monkeypatch) -> None:
    monkeypatch.delenv("PXMERGE_PORTABLE_IO", raising=False)
    assert not positional.is_portable() and positional.is_portable(True)
    monkeypatch.setenv("PXMERGE_PORTABLE_IO", "1")
    assert positional.is_portable()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_files_are_not_inherited_by_children(tmp_path, tensors) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    reader = FileReader(checkpoint)
    reader.read_into(checkpoint.tensors["w"], 0, memoryview(bytearray(4)))
    command = ["ls", "-l", "/proc/self/fd"]
    listed = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    assert "/dev/null" in listed.stdout or "pipe:" in listed.stdout
    assert "model.safetensors" not in listed.stdout
    reader.close()


def test_memory_reader_gives_the_bytes_a_file_would_hold(tmp_path, tensors) -> None:
    tensors["transposed"] = torch.randn(5, 6).T
    tensors["shared"] = tensors["w"]
    tensors["needs grad"] = torch.randn(3, requires_grad=True)
    tensors["conjugated"] = torch.randn(4, dtype=torch.complex64).conj()
    tensors["sliced"] = torch.arange(40.0)[::2]
    checkpoint = checkpoint_from_state_dict("model in memory", tensors)
    reader = MemoryReader(tensors)
    plain = {name: tensor.detach().resolve_conj().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "model.safetensors")
    on_disk = open_checkpoint(tmp_path)
    files = open_reader(on_disk)
    assert list(checkpoint.tensors) == list(tensors) and checkpoint.directory is None
    for _ in range(2):
        for name, stored in checkpoint.tensors.items():
            other = on_disk.tensors[name]
            assert (stored.dtype, stored.shape, stored.nbytes) == (other.dtype, other.shape, other.nbytes)
            ours, theirs = bytearray(stored.nbytes // 2), bytearray(stored.nbytes // 2)
            reader.read_into(stored, stored.nbytes - len(ours), memoryview(ours))
            files.read_into(other, stored.nbytes - len(ours), memoryview(theirs))
            assert ours == theirs, name
    reader.close()
    files.close()


def test_memory_checkpoints_refuse_what_a_file_cannot_hold(tensors) -> None:
    for bad, message in [
        (torch.ones(3).to_sparse(), "only dense tensors"),
        (torch.ones(3, device="meta"), "only dense tensors"),
        (torch.ones(3, dtype=torch.complex128), "complex128"),
        ({"x": 1}, "holds a dict, not a tensor"),
    ]:
        with pytest.raises(InputError, match=message):
            checkpoint_from_state_dict("m", {"x": bad})
    checkpoint = checkpoint_from_state_dict("m", tensors)
    with pytest.raises(InputError, match="w: bytes 8000 to 9000 asked of 8400"):
        MemoryReader(tensors).read_into(checkpoint.tensors["w"], 8000, memoryview(bytearray(1000)))
    with pytest.raises(InputError, match="no such tensor"):
        MemoryReader({}).read_into(checkpoint.tensors["w"], 0, memoryview(bytearray(1)))
    with pytest.raises(InputError, match="in memory"):
        open_reader(checkpoint)
