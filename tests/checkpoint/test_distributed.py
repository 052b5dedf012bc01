"""Distributed checkpoints: what torch saved, in one process and in two, is read to the bit; nothing else is made."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import InputError, MalformedCheckpointError

WRITER = Path(__file__).with_name("distributed_writer.py")


def _writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_writer", WRITER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHOLE: dict[str, torch.Tensor] = _writer().whole()


def read(checkpoint: Checkpoint, name: str, *, piece: int = 1 << 30) -> torch.Tensor:
    """A tensor, read in ranges of ``piece`` bytes."""
    stored = checkpoint.tensors[name]
    data = bytearray(stored.nbytes)
    with closing(open_reader(checkpoint)) as reader:
        for start in range(0, stored.nbytes, piece):
            reader.read_into(stored, start, memoryview(data)[start : start + piece])
    if not data:
        return torch.empty(stored.shape, dtype=stored.dtype.torch)
    return torch.frombuffer(data, dtype=stored.dtype.torch).reshape(stored.shape)


def save(folder: Path, state: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two processes saved, in both forms."""
    home = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WRITER), str(rank), port, str(home)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]
    return {form: home / form for form in ("distcp", "safetensors")}


@pytest.mark.parametrize("form", ["distcp", "safetensors"])
@pytest.mark.parametrize("piece", [4, 24, 1 << 20])
def test_pieces_of_two_processes_make_up_the_tensors(together: dict[str, Path], form: str, piece: int) -> None:
    checkpoint = open_checkpoint(together[form])
    assert set(checkpoint.tensors) == set(WHOLE)
    for name, value in WHOLE.items():
        assert checkpoint.tensors[name].shape == tuple(value.shape), name
        found = read(checkpoint, name, piece=piece if value.element_size() <= 4 else 8 * piece)
        assert torch.equal(found, value), name
    assert checkpoint.tensors["columns"].pieces and checkpoint.tensors["rows"].pieces


def test_torch_reads_the_same(together: dict[str, Path]) -> None:
    state = {"model": {name: torch.zeros_like(value) for name, value in WHOLE.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=together["distcp"], no_dist=True)
    checkpoint = open_checkpoint(together["distcp"])
    for name, value in state["model"].items():
        assert torch.equal(read(checkpoint, name), value), name


def test_what_belongs_to_the_training_is_left_out_and_said(together: dict[str, Path]) -> None:
    (note,) = open_checkpoint(together["distcp"]).notes
    assert "1 of optimizer" in note and "1 of step" in note


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"a.weight": 0}, {"a.weight"}),
        ({"model": {"model.norm.weight": 0}, "optim": {"state": {"x": 0}}}, {"model.norm.weight"}),
        ({"app": {"model": {"a": 0}, "optim": {"state": {"a": {"exp_avg": 0}}}}}, {"a"}),
        ({"state_dict": {"model.a": 0}, "lr_scheduler": {"last": 1}}, {"model.a"}),
        ({"model.a": 0, "optim.state.a.exp_avg": 0}, {"a"} | {"model.a"}),
        ({"scheduler_embedding.weight": 0, "opt.proj": 0}, {"scheduler_embedding.weight", "opt.proj"}),
    ],
)
def test_names_are_those_of_the_model(tmp_path: Path, state: dict, names: set[str]) -> None:
    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return torch.ones(2) if value == 0 else value

    found = set(open_checkpoint(save(tmp_path / "saved", filled(state))).tensors)  # type: ignore[arg-type]
    assert found and found <= names and not any("optim." in name for name in found)


def test_the_folder_of_the_model_inside_that_of_a_step(tmp_path: Path) -> None:
    save(tmp_path / "step100" / "model_and_optim", {"model": {"a": torch.arange(4.0)}})
    (tmp_path / "step100" / "config.json").write_text('{"model_type": "olmo"}')
    (tmp_path / "step100" / "train_state.pt").write_bytes(b"x")
    checkpoint = open_checkpoint(tmp_path / "step100")
    assert torch.equal(read(checkpoint, "a"), torch.arange(4.0))
    assert checkpoint.config == {"model_type": "olmo"}


def test_types_and_views(tmp_path: Path) -> None:
    values = {
        "fp8": torch.randn(6, 4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "f64": torch.randn(3, dtype=torch.float64),
        "part_of_a_storage": torch.arange(100.0)[10:20],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "empty": torch.zeros(0, 3),
    }
    checkpoint = open_checkpoint(save(tmp_path / "saved", values))
    for name, value in values.items():
        assert torch.equal(read(checkpoint, name).view(torch.uint8), value.detach().contiguous().view(torch.uint8)), (
            name
        )


class Evil:
    def __reduce__(self) -> object:
        return (os.system, ("touch evil",))


@pytest.mark.parametrize("place", ["planner_data", "storage_data", "state_dict_metadata"])
def test_metadata_that_names_other_classes_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "saved", {"a": torch.ones(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    getattr(metadata, place)["evil"] = Evil()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MalformedCheckpointError, match=r"names (posix|nt)\.system, which is no class of the format"):
        open_checkpoint(folder)
    assert not Path("evil").exists()


def test_a_piece_that_names_other_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "saved", {"a": torch.ones(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save({"a": Evil()}, buffer)
    (info,) = metadata.storage_data.values()
    info.offset, info.length = 0, len(buffer.getvalue())
    (folder / info.relative_path).write_bytes(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MalformedCheckpointError, match="no class of the format"):
        open_checkpoint(folder)
    assert not Path("evil").exists()


def test_damage_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", {"a": torch.arange(64.0), "b": torch.ones(3)})
    (file,) = folder.glob("*.distcp")
    whole, raw = file.read_bytes(), (folder / ".metadata").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            open_checkpoint(folder)
        assert "\n" not in str(error.value)

    file.rename(tmp_path / "away")
    refused(r"names __0_0\.distcp, which is missing")
    file.write_bytes(whole[:-10])
    refused("cut short")
    file.write_bytes(whole)
    (folder / ".metadata").write_bytes(raw[:-20])
    refused("damaged pickle")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused("not the metadata of a distributed checkpoint")
    metadata = pickle.loads(raw)
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([63])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused("and .metadata says F32")
    metadata = pickle.loads(raw)
    for info in metadata.storage_data.values():
        info.relative_path = "../away"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused("outside its folder")


def test_a_shard_that_is_missing_is_refused(together: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(together["safetensors"], folder)
    (note,) = open_checkpoint(folder).notes
    assert "2 shards" in note
    next(folder.glob("shard-00001-*")).unlink()
    with pytest.raises(MalformedCheckpointError, match="number 1 is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["__0_0.distcp"], "without its .metadata, which is written last"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "zero_to_fp32"),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "tensor-parallel"),
    ],
)
def test_other_shards_are_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path, allow_pickle=True)
