"""``pxmerge align --task-heads``: one rotation for several tasks, each with the head of its fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from mergekit_px.errors import TensorMismatchError, UsageError
from mergekit_px.learn.data import split_rows
from mergekit_px.learn.life import run_learner
from mergekit_px.learn.models import load_model
from mergekit_px.testing.checkpoints import write_checkpoint

CODE = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attn(x).tanh())


def net():
    return Net()
"""
CLASSES = (3, 2)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two tasks of three and of two classes in the current folder, and how they are aligned."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.weight": (6, 6), "attn.bias": (6,), "head.weight": (3, 6), "head.bias": (3,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for number, classes in enumerate(CLASSES):
        tuned = {name: one + 0.3 * torch.randn(one.shape, generator=generator) for name, one in base.items()}
        head = {name: torch.randn(classes, *shapes[name][1:], generator=generator) for name in shapes if "head" in name}
        write_checkpoint(Path(f"tuned{number}"), {**tuned, **head})
        inputs = torch.randn(60, 6, generator=generator)
        logits = (inputs @ tuned["attn.weight"].T + tuned["attn.bias"]).tanh() @ head["head.weight"].T
        np.savez(f"data{number}.npz", x=inputs.numpy(), labels=logits.argmax(-1).numpy())
    write_checkpoint(Path("base"), base)
    further = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in base.items()}
    write_checkpoint(Path("further"), further)
    data, tuned_models = (tuple(f"{name}{number}" for number in range(2)) for name in ("data", "tuned"))
    return {
        "base": "further", "source_base": "base", "source_model": tuned_models, "task_heads": ["head.*"],
        "data": tuple(f"{name}.npz" for name in data), "model": "net.py:net", "allow_code": True, "output": "out",
        "steps": 20, "evaluate_every": 5, "learning_rate": 0.02, "device": "cpu",
    }  # fmt: skip


def plain(body: dict[str, torch.Tensor], number: int, part: str) -> tuple[float, float, int]:
    """Loss, right predictions and examples of a task, with a body and the task's own head."""
    head = {k: v for k, v in load_file(f"tuned{number}/model.safetensors").items() if k.startswith("head.")}
    data = {name: torch.from_numpy(one) for name, one in np.load(f"data{number}.npz").items()}
    rows = split_rows(60, {"validation": 0.2, "test": 0.3}, 0, "data")[part]
    module = load_model(None, "net.py:net", allow_code=True).module
    logits = torch.func.functional_call(module, {**body, **head}, (data["x"][rows],))
    labels = data["labels"][rows]
    return float(functional.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).sum()), len(rows)


def test_each_task_is_seen_through_its_own_head(settings: dict[str, Any]) -> None:
    report = run_learner("align", **settings).report.model_dump(mode="json")
    body, further = (load_file(Path(name, "model.safetensors")) for name in ("out/model", "further"))
    assert all(torch.equal(body[name], further[name]) for name in body if name.startswith("head."))
    found = [plain(body, number, "test") for number in range(2)]
    for (_, right, count), scores in zip(found, report["tasks"], strict=True):
        assert scores["aligned"] == pytest.approx(100 * right / count)
    total = [sum(one[place] for one in found) for place in (1, 2)]
    assert report["test"]["aligned"] == pytest.approx(100 * total[0] / total[1])
    base, *tuned = (load_file(Path(name, "model.safetensors")) for name in ("base", "tuned0", "tuned1"))
    naive = {name: further[name] + sum(one[name] - base[name] for one in tuned) for name in base if "attn" in name}
    losses = [plain(naive, number, "validation")[0] for number in range(2)]
    assert report["trace"][0][2] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert min(one[2] for one in report["trace"]) < report["trace"][0][2]
    assert report["settings"]["task_heads"] == ["head.*"] and report["rotations"]["matrices"] == 1


def test_heads_that_there_are_not(settings: dict[str, Any]) -> None:
    for changes, error, message in [
        ({"data": "data0.npz"}, UsageError, "a file of data for each"),
        ({"task_heads": ["tail.*"]}, TensorMismatchError, "head.bias has shape"),
        ({"source_model": ["tuned0"] * 2, "task_heads": ["tail.*"]}, UsageError, "it names no tensor"),
        ({"route": "theseus"}, UsageError, "for the routes orthogonal and gradfix"),
        ({"test": "data0.npz"}, UsageError, "validation and test are shares"),
    ]:
        with pytest.raises(error, match=message):
            run_learner("align", **{**settings, **changes})
        assert not Path("out").exists()
