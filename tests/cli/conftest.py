from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub, point_client_at
from safetensors.torch import save_file

from mergekit_px.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    def document(self) -> dict:
        return json.loads(self.stdout)


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal of 80 columns, and a bandwidth that is known already."""
    cache = tmp_path / "cache"
    (cache / "pxmerge").mkdir(parents=True)
    known = {"memory": 1e10, "read": 1e9, "write": 1e9, "when": time.time()}
    (cache / "pxmerge" / "bandwidth.json").write_text(json.dumps({str(tmp_path.stat().st_dev): known}))
    for name, value in {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "XDG_CACHE_HOME": str(cache),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PXMERGE_DEBUG", "FORCE_COLOR", "GITHUB_ACTIONS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": draw(16, 8),
        "model.layers.0.mlp.up_proj.weight": draw(12, 8),
        "model.layers.0.input_layernorm.weight": draw(8),
        "model.layers.1.mlp.up_proj.weight": draw(12, 8),
        "model.layers.1.input_layernorm.weight": draw(8),
        "model.norm.weight": draw(8),
        "lm_head.weight": draw(16, 8),
    }


def save_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class Models:
    """A base and two fine-tunes of it, as folders and as tensors."""

    base: Path
    math: Path
    code: Path
    weights: dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    base = tensors(0)
    weights = {
        "base": base,
        "math": {name: value + tensors(1, 0.1)[name] for name, value in base.items()},
        "code": {name: value + tensors(2, 0.1)[name] for name, value in base.items()},
    }
    folders = {name: save_model(tmp_path / name, value) for name, value in weights.items()}
    monkeypatch.chdir(tmp_path)
    return Models(**folders, weights=weights)


@pytest.fixture
def hub(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A small Hub with the models on it, and the client logged in."""
    import huggingface_hub

    huggingface_hub.close_session()
    with FakeHub() as server:
        point_client_at(server, tmp_path / "home", monkeypatch, token=server.token)
        for name in ("base", "math", "code"):
            folder = getattr(models, name)
            server.add(f"org/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        yield server
        huggingface_hub.close_session()
