"""Class after class with adapters: ACMap's merging and mapping, beside what does without them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality import adapted_vit
from benchmarks.quality.adapted_vit import WIDTH, AdaptedViT, Bottleneck
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab, State
from mergekit_px.cli import main as pxmerge

TASKS, CLASSES, BEFORE = 5, 6, 10
"""Tasks, classes of each, and classes that the frozen backbone is trained on."""

TRAINED = 1300
"""Digits for training; the other 497 are for the test."""

Part = tuple[Tensor, Tensor]


def task_parts(lab: Lab) -> tuple[Part, list[Part], Part]:
    """Digits in four rotations are 40 classes, in an order drawn by the seed: the first ten for the backbone
    (numbered by themselves), the others, from 0, for the tasks; and the test of all tasks."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(lab.seed))
    place = torch.empty(40, dtype=torch.int64)
    place[order] = torch.arange(40)
    images = torch.cat([lab.images.rot90(turn, (2, 3)) for turn in range(4)])
    numbers = place[torch.cat([lab.labels + 10 * turn for turn in range(4)])]
    is_test = (torch.arange(len(lab.labels)) >= TRAINED).repeat(4)

    def part(first: int, count: int, *, test: bool) -> Part:
        rows = (numbers >= first) & (numbers < first + count) & (is_test == test)
        return images[rows], numbers[rows] - (first if first < BEFORE else BEFORE)

    tasks = [part(BEFORE + CLASSES * task, CLASSES, test=False) for task in range(TASKS)]
    return part(0, BEFORE, test=False), tasks, part(BEFORE, TASKS * CLASSES, test=True)


def fit(model: AdaptedViT, names: Sequence[str], data: Part, *, seed: int, epochs: int, rate: float) -> None:
    """Train some tensors of a model and a cosine head that is thrown away: AdamW, a cosine schedule, batches of 64."""
    images, labels = data
    labels = labels - labels.min()
    torch.manual_seed(seed)
    centres = nn.Parameter(torch.randn(int(labels.max()) + 1, WIDTH) * 0.02)
    scale = nn.Parameter(torch.ones(()))
    trained = [parameter for name, parameter in model.named_parameters() if name in names]
    optimizer = torch.optim.AdamW([*trained, centres, scale], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            cosines = functional.normalize(model(images[rows]), dim=1) @ functional.normalize(centres, dim=1).T
            functional.cross_entropy(scale * cosines, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


class Continual:
    """The tasks, a frozen backbone, and adapters trained on them, as files; all else by `pxmerge`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        start, self.tasks, test = task_parts(lab)
        torch.manual_seed(lab.seed)
        self.model = AdaptedViT()
        state = self.model.state_dict()
        self.adapter_names = [name for name in state if ".adapter." in name]
        backbone = [name for name in state if name not in self.adapter_names]
        fit(self.model, backbone, start, seed=lab.seed, epochs=30, rate=3e-3)
        self.base = lab.save("backbone", {name: state[name].clone() for name in backbone})
        self.data = [lab.data(f"task{number}", *part) for number, part in enumerate(self.tasks, 1)]
        self.every = lab.data("every", torch.cat([x for x, _ in self.tasks]), torch.cat([y for _, y in self.tasks]))
        self.test = lab.data("test", *test)

    def new_adapter(self, seed: int) -> State:
        torch.manual_seed(seed)
        blocks = {f"blocks.{block}.adapter": Bottleneck().state_dict() for block in range(2)}
        return {f"{block}.{name}": one for block, named in blocks.items() for name, one in named.items()}

    def train(self, task: int, start: State) -> State:
        """The adapter of a task, trained for 25 epochs."""
        self.model.load_state_dict(start, strict=False)
        fit(self.model, self.adapter_names, self.tasks[task - 1], seed=self.lab.seed + task, epochs=25, rate=5e-3)
        state = self.model.state_dict()
        return {name: state[name].clone() for name in self.adapter_names}

    def save(self, name: str, adapter: State) -> str:
        path = self.lab.folder / f"{name}.safetensors"
        save_file(adapter, path)
        return str(path)

    def mapped(self, name: str, adapters: Sequence[str], data: Sequence[str], mode: str = "average") -> str:
        """A state with these adapters merged and these tasks mapped."""
        state = str(self.lab.folder / name)
        acmap("merge", *adapters, "--state", state, "--mode", mode)
        for part in data:
            acmap("map", "--state", state, "--data", part, *self.forward())
        return state

    def accuracy(self, state: str, *options: str) -> float:
        """Percent of the test of all tasks."""
        found = acmap("classify", "--state", state, "--data", self.test, *self.forward(), *options)
        return float(found["accuracy"]["overall"])

    def oracle(self, name: str, state: str) -> float:
        """The accuracy of prototypes that are measured again under the last merged adapter, with all old data."""
        merged = str(self.lab.folder / f"{name}-merged.safetensors")
        acmap("export", "--state", state, "--adapter", str(TASKS), "-o", merged)
        return self.accuracy(self.mapped(f"{name}-oracle", [merged], [self.every]))

    def drift(self, state: str) -> dict[str, float]:
        """Relative distance of the first task's prototypes from those that its data give in the end."""
        words = ("map", "--state", state, "--data", self.data[-1], "--oracle", self.data[0], *self.forward())
        found: dict[str, float] = acmap(*words)["drift"]
        return found

    def forward(self) -> list[str]:
        place = f"{Path(adapted_vit.__file__).resolve()}:AdaptedViT"
        return ["--base", self.base, "--model", place, "--allow-code", "--device", "cpu"]


def acmap(*words: str) -> dict[str, Any]:
    """What a line of `pxmerge acmap` prints as JSON."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = pxmerge(["acmap", *words, "--json"])
    if code != 0:
        raise RuntimeError(f"pxmerge acmap {' '.join(words)} ended with {code}: {errors.getvalue()}")
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def continual(lab: Lab) -> Scores:
    """Five tasks of six classes on a backbone trained on ten others; adapters of rank 16."""
    work = Continual(lab)
    new = [work.new_adapter(1000 * lab.seed + number) for number in range(TASKS)]
    first = work.train(1, new[0])
    starts = {"random": new[1:], "shared": new[:1] * (TASKS - 1), "IR": [first] * (TASKS - 1)}
    found: Scores = {}
    for name, others in starts.items():
        trained = [first, *(work.train(task, start) for task, start in enumerate(others, 2))]
        files = [work.save(f"{name}{task}", adapter) for task, adapter in enumerate(trained, 1)]
        state = work.mapped(name, files, work.data)
        found[f"{name}, no mapping"] = work.accuracy(state, "--no-mapping")
        found[f"{name}, mapped"] = work.accuracy(state)
        found[f"{name}, oracle"] = work.oracle(name, state)
        drift = work.drift(state)
        found[f"({name}, drift before)"], found[f"({name}, drift after)"] = drift["before"], drift["after"]
        last = work.mapped(f"{name}-last", files, work.data, mode="none")
        found[f"{name}, last adapter alone"] = work.accuracy(last, "--no-mapping")
    found["SimpleCIL"] = work.accuracy(work.mapped("simple", [work.save("fresh", new[0])], [work.every]))
    found["APER"] = work.accuracy(work.mapped("aper", [work.save("first", first)], [work.every]))
    stopped = str(lab.folder / "stopped")
    acmap(
        "merge",
        *[str(lab.folder / f"IR{task}.safetensors") for task in range(1, 4)],
        "--state",
        stopped,
        "--limit",
        "3",
    )
    for part in work.data:
        acmap("map", "--state", stopped, "--data", part, *work.forward())
    found["IR, stop after 3"] = work.accuracy(stopped)
    return found


EXPERIMENTS = (
    Experiment(
        "acmap",
        continual,
        (
            ("IR > shared, without mapping", lambda s: s["IR, no mapping"] > s["shared, no mapping"]),
            ("IR > random, without mapping", lambda s: s["IR, no mapping"] > s["random, no mapping"]),
            ("IR: mapped >= no mapping", lambda s: s["IR, mapped"] >= s["IR, no mapping"]),
            ("IR: oracle >= mapped", lambda s: s["IR, oracle"] >= s["IR, mapped"]),
            ("shared: mapped >= no mapping", lambda s: s["shared, mapped"] >= s["shared, no mapping"]),
            ("shared: oracle >= mapped", lambda s: s["shared, oracle"] >= s["shared, mapped"]),
            ("IR > last adapter alone + 5", lambda s: s["IR, mapped"] > s["IR, last adapter alone"] + 5),
        ),
    ),
)
