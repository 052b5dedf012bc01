"""Runs that learn or measure, ended by SIGKILL or Ctrl-C at many moments: what goes on gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.learn.models import load_model
from mergekit_px.testing.checkpoints import write_checkpoint

LAUNCHER = """
import json, os, signal, sys, traceback
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
import mergekit_px.learn.align.run, mergekit_px.learn.ofasd.run, mergekit_px.learn.search.run
import mergekit_px.learn.stats.run
import mergekit_px.learn.transfer.report as transfer
import mergekit_px.learn.tune.run
from mergekit_px.cli import main
from mergekit_px.learn.state import StateFile
from mergekit_px.methods import load_methods

load_methods()
torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()  # imports much when it is first called

def child(order):
    os.chdir(order["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    counts = {"step": 0, "forward": 0, "rename": 0}
    kind, _, last = (order["end"] or "").partition(":")

    def count(what):
        counts[what] += 1
        if what == kind and counts[what] == int(last):
            os.kill(os.getpid(), order["signal"])

    def audit(event, arguments):
        if event == "os.rename" and "out" in str(arguments[1]).partition("/")[0]:
            count("rename")

    register_optimizer_step_pre_hook(lambda *given: count("step"))
    register_module_forward_pre_hook(lambda *given: count("forward"))
    sys.addaudithook(audit)
    StateFile.due = True
    transfer.write_picture = lambda document, path: None
    try:
        code = main(order["words"])
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    with open("counts", "w") as file:
        json.dump(counts, file)
    os._exit(code)

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(0)  # taking everything down again costs a second
"""

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def net():
    return Net()
"""

Launch = Callable[..., int]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Runs ``pxmerge`` in a process of its own, which may be told to end itself; returns the exit code.

    One process imports everything and is copied for each run, so that a run costs its own time alone.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads cost more than such small matrices
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(folder: Path, words: list[str], end: str | None = None, signal: int = signal.SIGKILL) -> int:
            folder.mkdir(parents=True, exist_ok=True)
            order = {"folder": str(folder), "words": words, "end": end, "signal": int(signal)}
            print(json.dumps(order), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@dataclass(frozen=True)
class World:
    """Where the inputs are, and the command line of each learner; all of them write to ``out`` or ``out.*``."""

    root: Path
    commands: dict[str, list[str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("kill")
    (root / "net.py").write_text(NET)
    place = f"{root / 'net.py'}:net"
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    inputs = torch.randn(4, 8, generator=generator)[labels] + torch.randn(80, 8, generator=generator)
    np.savez(root / "data.npz", x=inputs.numpy(), labels=labels.numpy())
    torch.manual_seed(1)
    base = load_model(None, place, allow_code=True).module.state_dict()
    write_checkpoint(root / "base", base)
    for number in range(2):
        tuned = {name: one + 0.2 * torch.randn(one.shape, generator=generator) for name, one in base.items()}
        write_checkpoint(root / f"client{number}", tuned)
    tensors = {}
    for name in ("first.weight", "second.weight"):
        u, s, v = torch.linalg.svd(torch.randn(base[name].shape, generator=generator), full_matrices=False)
        tensors |= {f"{name}.U": u[:, :3], f"{name}.S": s[:3], f"{name}.V": v[:3].T}
    components = {name: one.contiguous() for name, one in tensors.items()}
    save_file(components, root / "components.safetensors", {"pxmerge.kind": "components"})
    (root / "recipe.yaml").write_text(
        f"models: {{a: {root / 'client0'}, b: {root / 'client1'}, base: {root / 'base'}}}\n"
        "merge: {method: task_arithmetic, base: base, sources: {a: 0.5, b: 0.5},"
        " rules: [{match: 'first*', weights: {a: 0.3, b: 0.3}}]}\n"
    )
    side: dict[str, Any] = {"model": place, "data": str(root / "data.npz"), "batch": 8, "optimizer": {"lr": 0.01}}
    pairs = [{"target": "first.weight", "source": "first.weight", "rank": 4}]
    plan = {
        "models": {"one": side, "two": {**side}},
        "transfer": {"mode": "joint", "target": "one", "source": "two", "steps": 12, "cycle": 2, "save_every": 4,
                     "controls": ["none"], "pairs": pairs},
    }  # fmt: skip
    (root / "plan.yaml").write_text(json.dumps(plan))
    model = ["--model", place, "--allow-code", "--device", "cpu", "-q"]
    data = ["--data", str(root / "data.npz")]
    base_and_clients = ["--base", str(root / "base"), "--sources", str(root / "client0"), str(root / "client1")]
    fit = ["--steps", "12", "--evaluate-every", "4", "--batch", "16"]
    transported = ["--source-base", str(root / "base"), "--source-model", str(root / "client0")]
    transported += ["--base", str(root / "client1"), "--sites", "all", "--sided", "two"]
    return World(
        root,
        {
            "ofasd": ["ofasd", *base_and_clients, *data, "-o", "out", *fit, *model],
            "align": ["align", *transported, *data, "-o", "out", *fit, *model],
            "tune": ["tune", str(root / "components.safetensors"), "--base", str(root / "base"), *data, "-o", "out",
                     "--steps", "12", "--batch", "16", *model],
            "search": ["search", str(root / "recipe.yaml"), "--over", "merge.sources.a=0,1", *data, "-o", "out",
                       *model],
            "transfer": ["transfer", str(root / "plan.yaml"), "-o", "out", "--allow-code", "--threads", "1", "-q"],
            "stats": ["stats", str(root / "base"), *data, "-o", "out.safetensors", "--batch", "16", *model],
        },
    )  # fmt: skip


LEARNERS = ["ofasd", "align", "tune", "search", "transfer", "stats"]


@pytest.fixture(scope="module")
def whole(world: World, launch: Launch) -> Callable[[str], tuple[dict[str, Any], dict[str, int]]]:
    """What a learner leaves that nothing disturbs, and how many steps, forward passes and renames it takes."""
    known: dict[str, tuple[dict[str, Any], dict[str, int]]] = {}

    def find(learner: str) -> tuple[dict[str, Any], dict[str, int]]:
        if learner not in known:
            folder = world.root / "whole" / learner
            assert launch(folder, world.commands[learner]) == 0, (folder / "stderr").read_text()
            known[learner] = written(folder), json.loads((folder / "counts").read_text())
        return known[learner]

    return find


def written(folder: Path) -> dict[str, Any]:
    """Every file of a result; what depends on the clock is left out."""
    found: dict[str, Any] = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and one.parent != folder) + sorted(
        folder.glob("out.*")
    ):
        name = path.relative_to(folder).as_posix()
        found[name] = path.read_bytes()
        if name in ("out/report.json", "out/trials.jsonl"):
            lines = found[name].splitlines() if name.endswith("l") else [found[name]]
            found[name] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        if name == "out/pxmerge.lock.json":
            found[name] = {k: v for k, v in json.loads(found[name])["files"].items() if k != "trials.jsonl"}
    assert found
    return found


def part_way(share: float, learner: str, counts: dict[str, int]) -> str:
    """After so many of the steps or forward passes."""
    kind = "forward" if learner in ("search", "stats") else "step"
    return f"{kind}:{round(share * counts[kind])}"


def moments(learner: str, counts: dict[str, int]) -> list[str]:
    """In the midst of steps or passes, at the last, and before the first, the last, and another file gets its name.

    Later in the midst is where the other tests end a run.
    """
    renames = sorted({1, counts["rename"] // 2, counts["rename"]})
    return [*(part_way(share, learner, counts) for share in (0.3, 1)), *(f"rename:{number}" for number in renames)]


@pytest.mark.parametrize("learner", LEARNERS)
def test_what_was_killed_goes_on_to_the_same_bytes(learner: str, world: World, launch: Launch, whole) -> None:
    expected, counts = whole(learner)
    words = world.commands[learner]
    for moment in moments(learner, counts):
        folder = world.root / "killed" / learner / moment
        assert launch(folder, words, moment) == -signal.SIGKILL
        assert launch(folder, [*words, "--resume"]) == 0, (moment, (folder / "stderr").read_text())
        assert written(folder) == expected, moment


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_resumed_run_may_be_killed_again(learner: str, world: World, launch: Launch, whole) -> None:
    expected, counts = whole(learner)
    words = world.commands[learner]
    later = part_way(0.7, learner, counts)
    folder = world.root / "twice" / learner
    assert launch(folder, words, later) == -signal.SIGKILL
    done = launch(folder, [*words, "--resume"], f"rename:{counts['rename'] // 4 + 2}")
    assert done in (0, -signal.SIGKILL)
    if done:
        assert launch(folder, [*words, "--resume"]) == 0, (folder / "stderr").read_text()
    assert written(folder) == expected


@pytest.mark.parametrize("learner", LEARNERS)
def test_interrupted_says_how_to_go_on(learner: str, world: World, launch: Launch, whole) -> None:
    expected, counts = whole(learner)
    words = world.commands[learner]
    folder = world.root / "interrupted" / learner
    assert launch(folder, words, part_way(0.7, learner, counts), signal.SIGINT) == 130
    [line] = (folder / "stderr").read_text().splitlines()
    assert line.startswith(f"interrupted; to go on: pxmerge {learner} ") and line.endswith(" --resume")
    assert launch(folder, words) == 4
    [line] = (folder / "stderr").read_text().splitlines()
    assert "unfinished" in line and "--resume" in line and "--overwrite" in line
    assert launch(folder, [*words, "--resume"]) == 0
    assert written(folder) == expected


def test_what_a_killed_search_kept_is_not_taken_for_another(world: World, launch: Launch, whole) -> None:
    words = [*world.commands["search"], "--scratch", "."]
    passes = whole("search")[1]["forward"]
    folder = world.root / "other"
    assert launch(folder, words, f"forward:{passes // 2}") == -signal.SIGKILL
    assert list(folder.glob("pxmerge-search-*/kept"))
    changed = [word.replace("recipe.yaml", "changed.yaml") for word in words]
    recipe = (world.root / "recipe.yaml").read_text()
    (world.root / "changed.yaml").write_text(recipe.replace("{a: 0.3, b: 0.3}", "{a: -2, b: -2}"))
    assert launch(folder, [*changed, "--overwrite"]) == 0
    assert not list(folder.glob("pxmerge-search-*"))
    assert launch(world.root / "fresh", changed) == 0
    reports = [json.loads((place / "out" / "report.json").read_text()) for place in (folder, world.root / "fresh")]
    assert reports[0]["scores"] == reports[1]["scores"]
    models = [load_file(place / "out" / "model" / "model.safetensors") for place in (folder, world.root / "fresh")]
    assert all(torch.equal(models[0][name], one) for name, one in models[1].items())
