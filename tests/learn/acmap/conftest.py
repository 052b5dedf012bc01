"""A class-incremental problem as files: task adapters, data, a small model, and the features it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.adapters.acmap import AcmapState

WIDTH, HIDDEN, BOTTLENECK = 6, 8, 3
MODEL = f"""
import torch
from torch import nn


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear({HIDDEN}, {BOTTLENECK})
        self.up = nn.Linear({BOTTLENECK}, {HIDDEN})
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.up(torch.relu(self.down(x)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear({WIDTH}, {HIDDEN})
        self.adapter = Adapter()

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return hidden + self.adapter(hidden)


def make():
    torch.manual_seed(5)
    return Tiny()


def broken():
    return Tiny().half_of_it
"""


def draw_adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {
        "adapter.down.weight": (BOTTLENECK, HIDDEN),
        "adapter.down.bias": (BOTTLENECK,),
        "adapter.up.weight": (HIDDEN, BOTTLENECK),
        "adapter.up.bias": (HIDDEN,),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def body() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "body.weight": torch.randn(HIDDEN, WIDTH, generator=generator),
        "body.bias": torch.randn(HIDDEN, generator=generator),
    }


def run_by_hand(
    x: np.ndarray, base: Mapping[str, torch.Tensor], adapter: Mapping[str, np.ndarray] | None
) -> np.ndarray:
    """The forward pass of the model in numpy, float64."""
    hidden = np.tanh(x @ base["body.weight"].double().numpy().T + base["body.bias"].double().numpy())
    if adapter is None:
        return hidden
    inner = np.maximum(hidden @ adapter["adapter.down.weight"].T + adapter["adapter.down.bias"], 0)
    return hidden + inner @ adapter["adapter.up.weight"].T + adapter["adapter.up.bias"]


@dataclass
class Problem:
    """T tasks of two or three classes each; everything under ``folder``."""

    folder: Path
    limit: int
    inputs: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    adapters: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def model(self) -> str:
        return f"{self.folder / 'tiny.py'}:make"

    def merged(self, number: int) -> dict[str, np.ndarray]:
        """The mean of the first adapters, rounded to float32 as it is stored."""
        return {
            name: np.mean([one[name].double().numpy() for one in self.adapters[:number]], axis=0)
            .astype(np.float32)
            .astype(np.float64)
            for name in self.adapters[0]
        }

    def number(self, task: int) -> int:
        return min(task, self.limit) if self.limit else task

    def features(self, task: int, number: int, inputs: np.ndarray | None = None) -> np.ndarray:
        x = self.inputs[task - 1] if inputs is None else inputs
        return run_by_hand(x, body(), self.merged(number) if number else None)

    def merge(self, upto: int | None = None, **settings: object) -> None:
        state = AcmapState(limit=self.limit, **settings)  # type: ignore[arg-type]
        for number, adapter in enumerate(self.adapters[:upto], 1):
            state.add(adapter, f"task{number}")
        state.save(self.state)

    def write_features(self, task: int, *, plain: bool = False, name: str | None = None) -> str:
        current = self.number(task)
        arrays = {"features": self.features(task, current), "labels": self.labels[task - 1]}
        numbers = range(1, task) if current == task else range(0)
        for number in [*numbers, *([0] if plain else [])]:
            arrays[f"features_{number}"] = self.features(task, number)
        path = self.folder / (name or f"features{task}.npz")
        np.savez(path, **arrays)
        return str(path)

    def write_data(self, task: int) -> str:
        path = self.folder / f"data{task}.npz"
        np.savez(path, x=self.inputs[task - 1].astype(np.float32), labels=self.labels[task - 1])
        return str(path)

    def by_hand(self, upto: int) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Originals and mapped prototypes by class after ``upto`` tasks, written from the pseudo-code of the paper."""
        originals: dict[int, tuple[np.ndarray, int]] = {}
        delta: dict[int, np.ndarray] = {}

        def means(task: int, number: int) -> dict[int, np.ndarray]:
            features, labels = self.features(task, number), self.labels[task - 1]
            return {int(c): features[labels == c].mean(axis=0) for c in np.unique(labels)}

        for task in range(1, upto + 1):
            new = means(task, self.number(task))
            for c, vector in new.items():
                originals[c] = (vector, task)
            if not self.limit or task <= self.limit:
                centre = np.mean(list(new.values()), axis=0)
                for earlier in range(1, task):
                    delta[earlier] = centre - np.mean(list(means(task, earlier).values()), axis=0)
        mapped = {c: vector + delta.get(task, 0.0) for c, (vector, task) in originals.items()}
        return {c: vector for c, (vector, _) in originals.items()}, mapped


def make_problem(folder: Path, tasks: int, limit: int) -> Problem:
    problem = Problem(folder, limit)
    random = np.random.default_rng(3)
    start = 0
    for task in range(tasks):
        classes = 2 + task % 2
        # Unequal classes, so that a mean of class means is not the mean of the examples.
        labels = np.concatenate([np.full(4 + 3 * c, start + c) for c in range(classes)])
        centres = random.normal(size=(classes, WIDTH)) * 2
        x = centres[labels - start] + 0.3 * random.normal(size=(len(labels), WIDTH))
        order = random.permutation(len(labels))
        problem.inputs.append(x[order].astype(np.float32).astype(np.float64))
        problem.labels.append(labels[order])
        problem.adapters.append(draw_adapter(task))
        start += classes
    (folder / "tiny.py").write_text(MODEL)
    (folder / "base").mkdir()
    save_file(body(), folder / "base" / "model.safetensors")
    return problem


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """Five tasks and a stop after three of them; all adapters merged."""
    made = make_problem(tmp_path, tasks=5, limit=3)
    made.merge()
    return made
