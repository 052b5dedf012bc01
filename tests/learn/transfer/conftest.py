"""A small place to run transfers in: two architectures in a file of the user, data, checkpoints, a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main

CODE = '''
import torch
from torch import nn

class Wide(nn.Module):
    """A perceptron with dropout, and a layer that its loss never uses."""
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(12, 3)
        self.unused = nn.Linear(4, 4)
    def forward(self, pixels):
        return self.second(self.drop(self.first(pixels.flatten(1)).relu()))

class Kernels(nn.Module):
    """A convolutional network with batch norm."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(24, 3)
    def forward(self, pixels):
        hidden = self.norm(self.conv(pixels)).relu()
        return self.head(nn.functional.max_pool2d(self.deep(hidden).relu(), 2).flatten(1))

def wide(): return Wide()
def kernels(): return Kernels()

def fixed():
    model = Wide()
    model.first.weight.requires_grad_(False)
    return model

def tied():
    model = Wide()
    model.again = nn.Linear(16, 12)
    model.again.weight = model.first.weight
    return model

def data(part, seed, epoch):
    generator = torch.Generator().manual_seed(epoch)
    for number in range(5 if part == "train" else 2):
        labels = torch.arange(9) % 3
        yield {"pixels": torch.randn(9, 1, 4, 4, generator=generator) + labels[:, None, None, None], "labels": labels}

def no_labels(part, seed, epoch):
    yield {"pixels": torch.zeros(2, 1, 4, 4)}

def no_batches(part, seed, epoch):
    return []

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["pixels"]), batch["labels"], label_smoothing=0.1)

def nothing(model, batches):
    return float("nan")

def right(model, batches):
    return sum(int((model(b["pixels"]).argmax(1) == b["labels"]).sum()) for b in batches)

def vector_loss(model, batch):
    return model(batch["pixels"])
'''


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@dataclass
class Place:
    """A folder with everything, and the command line in it.

    Attributes:
        plan: to be changed by tests; written to ``plan.yaml`` by every `run`.
    """

    folder: Path
    capture: pytest.CaptureFixture[str]
    plan: dict[str, Any] = field(default_factory=dict)

    def run(self, *words: object, code: int | None = 0, write: bool = True, verb: str = "transfer") -> Outcome:
        """``pxmerge VERB plan.yaml --allow-code ...`` on one thread; checks the exit code unless it is None."""
        if write:
            Path("plan.yaml").write_text(json.dumps(self.plan))
        self.capture.readouterr()
        threads = ("--threads", "1") if verb == "transfer" else ()
        words = (verb, "plan.yaml", "--allow-code", *threads, "-q", *words)
        found = main([str(word) for word in words])
        captured = self.capture.readouterr()
        assert code is None or found == code, captured.err
        return Outcome(found, captured.out, captured.err)

    def fails(self, *words: object, code: int = 2) -> str:
        """The line that a run that cannot be done ends with."""
        found = self.run(*words, code=code).stderr
        assert found.count("\n") == 1
        assert found.startswith("error: ")
        return found.removeprefix("error: ").strip()

    @property
    def transfer(self) -> dict[str, Any]:
        return self.plan["transfer"]

    def report(self, output: str = "out") -> dict[str, Any]:
        return json.loads(Path(output, "report.json").read_text())

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        return load_file(Path(path, "model.safetensors"))

    def checkpoint(self, name: str, function: str, dtype: torch.dtype = torch.float32) -> Path:
        """A checkpoint folder of a model of the user's code, with a config and side files."""
        names: dict[str, Any] = {}
        exec(compile(CODE, "nets.py", "exec"), names)
        torch.manual_seed(5)
        state = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in names[function]().state_dict().items()
        }
        folder = self.folder / name
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "mine"}')
        (folder / "preprocessor_config.json").write_text("{}")
        return folder


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Every file under a folder."""
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def files() -> Callable[[str | Path], dict[str, bytes]]:
    return files_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mergekit_px.learn.transfer.report.write_picture", lambda document, path: None)
    Path("nets.py").write_text(CODE)
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = generator.normal(size=(60, 1, 4, 4)).astype(np.float32) + 0.5 * labels[:, None, None, None]
    np.savez("long.npz", pixels=pixels.astype(np.float32), labels=labels)
    np.savez("short.npz", pixels=pixels[:20].astype(np.float32), labels=labels[:20])
    yield Place(
        tmp_path,
        capsys,
        {
            "models": {
                "wide": {
                    "model": "nets.py:wide",
                    "data": "short.npz",
                    "batch": 5,
                    "optimizer": {"name": "sgd", "lr": 0.1},
                },
                "kernels": {"model": "nets.py:kernels", "data": "long.npz", "batch": 6, "optimizer": {"lr": 0.01}},
            },
            "transfer": {
                "source": "wide",
                "target": "kernels",
                "pairs": [{"target": "deep.weight", "source": "first.weight", "rank": [3, 4]}],
                "steps": 12,
                "save_every": 12,
                "cycle": 3,
                "adapter": {"heads": 2, "min_width": 8, "lr": 0.01},
                "controls": ["none"],
            },
            "output": "out",
        },
    )
