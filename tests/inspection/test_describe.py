from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipelines import write_pipeline
from safetensors.torch import save_file

from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.cli import main
from mergekit_px.errors import InputNotFoundError
from mergekit_px.inspection.describe import describe, tensor_rows
from mergekit_px.plan.inputs import fetch_input, open_input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
        "model.layers.0.up.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
        "model.layers.1.up.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
        "model.position_ids": torch.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["X"], "model_type": "x", "text_config": {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_folder_is_described_by_its_headers(folder: Path) -> None:
    found = describe(open_input(str(folder)))
    size = (folder / "model.safetensors").stat().st_size
    assert found["files"][0] | {"header_sha256": ""} == {
        "name": "model.safetensors",
        "bytes": size,
        "tensors": 4,
        "header_sha256": "",
    }
    assert found["dtypes"] == {
        "BF16": {"tensors": 3, "parameters": 56, "bytes": 112},
        "I64": {"tensors": 1, "parameters": 3, "bytes": 24},
    }
    expected = {
        "kind": "model",
        "format": "safetensors",
        "commit": None,
        "architectures": ["X"],
        "model_type": "x",
        "tensors": 4,
        "parameters": 59,
        "bytes": 136,
        "layers": {"model.layers.": 2},
        "tied_embeddings": True,
        "embedding_and_head": ["model.embed_tokens.weight"],
        "base_fingerprint": None,
        "side_files": ["tokenizer.json"],
        "metadata": {"format": "pt"},
    }
    assert {key: found[key] for key in expected} == expected
    json.dumps(found)


def test_a_task_vector_is_recognised(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "tau.safetensors", metadata=task_vector_metadata("f" * 64))
    found = describe(open_input(str(tmp_path / "tau.safetensors")))
    assert (found["kind"], found["base_fingerprint"]) == ("task vector", "f" * 64)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("adapter_model.safetensors", "base_model.model.q.lora_A.weight"),
        ("pytorch_lora_weights.safetensors", "unet.q.lora_down.weight"),
    ],
)
def test_an_adapter_is_recognised(tmp_path: Path, file: str, name: str) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / file)
    assert describe(open_input(str(tmp_path)))["kind"] == "adapter"


def test_tensors_are_listed_by_a_glob(folder: Path) -> None:
    rows = tensor_rows(open_input(str(folder)).checkpoint, "*.layers.1.*")
    expected = {"name": "model.layers.1.up.weight", "dtype": "BF16", "shape": [4, 4], "bytes": 32}
    assert rows == [expected | {"file": "model.safetensors"}]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="nowhere"):
        open_input(str(tmp_path / "nowhere"))


def test_local_files_need_no_fetching(folder: Path) -> None:
    source = open_input(str(folder))
    assert fetch_input(source) is source


def test_the_components_of_a_pipeline_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = write_pipeline(tmp_path / "pipeline", 1)
    found = describe(open_input(str(pipeline)))
    assert found["components"]["text_encoder"] == {
        "class": "CLIPTextModel",
        "tensors": 2,
        "parameters": 14,
        "bytes": 56,
        "dtypes": ["F32"],
    }
    assert list(found["components"]) == ["unet", "vae", "text_encoder"] and found["tensors"] == 6
    assert main(["inspect", str(pipeline)]) == 0
    assert "AutoencoderKL" in capsys.readouterr().out


def test_encoded_tensors_are_counted_by_their_kind(tmp_path: Path) -> None:
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"w.weight": codes, "w.weight_scale": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"w.qweight": torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "b.safetensors")
    for name in "ab":
        assert sum(describe(open_input(str(tmp_path / f"{name}.safetensors")))["stored_as"].values()) == 1
