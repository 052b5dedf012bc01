"""``pxmerge ofasd`` from files to files: what is learned, applied, resumed, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.artefacts.coefficients import read_table
from mergekit_px.cli import main
from mergekit_px.errors import DivergedError, InputError, OutputError, UsageError
from mergekit_px.learn.data import split_rows
from mergekit_px.learn.life import run_learner
from mergekit_px.learn.models import load_model
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.training import Progress
from mergekit_px.plan.inputs import fetch_checkpoint
from mergekit_px.testing.checkpoints import write_checkpoint

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def plain():
    return Net(False)


def normed():
    return Net(True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, a base that knows a little, two fine-tunes that know two classes each."""
    root = tmp_path_factory.mktemp("ofasd")
    (root / "net.py").write_text(MODEL)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 8, generator=generator)
    labels = torch.arange(400) % 4
    inputs = centres[labels] + 0.7 * torch.randn(400, 8, generator=generator)
    np.savez(root / "labelled.npz", x=inputs.numpy(), labels=labels.numpy())
    np.savez(root / "unlabelled.npz", x=inputs.numpy())
    few = labels < 2
    np.savez(root / "low.npz", x=inputs[few].numpy(), labels=labels[few].numpy())
    np.savez(root / "high.npz", x=inputs[~few].numpy(), labels=labels[~few].numpy())
    for kind in ("plain", "normed"):
        place = f"{root / 'net.py'}:{kind}"
        torch.manual_seed(1)
        base = load_model(None, place, allow_code=True).module
        train(base, inputs[:24], labels[:24], steps=10)
        write_checkpoint(root / kind / "base", base.state_dict())
        for number, rows in enumerate((few, ~few)):
            client = load_model(fetch_checkpoint(str(root / kind / "base")), place, allow_code=True).module
            train(client, inputs[rows], labels[rows], steps=40)
            write_checkpoint(root / kind / f"client{number}", client.state_dict())
    return root


def train(module: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, steps: int) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()


def options(world: Path, output: Path, kind: str = "plain", **changes: Any) -> dict[str, Any]:
    return {
        "base": world / kind / "base",
        "sources": [world / kind / "client0", world / kind / "client1"],
        "data": world / "labelled.npz",
        "output": output,
        "model": f"{world / 'net.py'}:{kind}",
        "allow_code": True,
        "device": "cpu",
        "steps": 20,
        "batch": 64,
        "evaluate_every": 5,
        "learning_rate": 0.05,
        **changes,
    }


def learned(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The report."""
    return run_learner("ofasd", **settings, **more).report.model_dump(mode="json")


def applied(output: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    assert main(["run", str(output / "recipe.yaml"), "-o", str(tmp_path / "merged"), "-q"]) == 0
    return load_file(tmp_path / "merged" / "model.safetensors")


def accuracy(world: Path, kind: str, tensors: dict[str, torch.Tensor], tmp_path: Path, rows: slice) -> float:
    folder = write_checkpoint(tmp_path / "scored", tensors)
    module = load_model(fetch_checkpoint(str(folder)), f"{world / 'net.py'}:{kind}", allow_code=True).module.eval()
    with np.load(world / "labelled.npz") as data:
        inputs, labels = torch.from_numpy(data["x"][rows]), torch.from_numpy(data["labels"][rows])
    with torch.no_grad():
        return 100 * float((module(inputs).argmax(-1) == labels).double().mean())


def test_distillation_learns_writes_and_applies(world: Path, tmp_path: Path) -> None:
    report = learned(options(world, tmp_path / "out"))
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["test"]) == {"base", "average", "isotropic", "learned"}
    trace = report["trace"]
    assert trace[0][:2] == [0, None] and report["best_validation_score"] < trace[0][2]
    assert report["test"]["learned"]["divergence"] < report["test"]["average"]["divergence"]
    assert {"accuracy", "agreement", "entropy", "kept", "sources"} == set(report["teacher"])
    assert len(report["inputs"]["base"][0]["files"]["model.safetensors"]) == 64
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0 and not (tmp_path / "out" / ".pxmerge").exists()
    _, table, _ = read_table(tmp_path / "out")
    assert set(table.blocks) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    merged = applied(tmp_path / "out", tmp_path)
    base, *clients = [
        load_file(world / "plain" / name / "model.safetensors") for name in ("base", "client0", "client1")
    ]
    for name, tensor in merged.items():
        row = [values[0] for values in table.of_tensor(name, 2)]
        expected = base[name] + sum(c * (client[name] - base[name]) for c, client in zip(row, clients, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_the_start_is_the_average_and_no_steps_leave_it(world: Path, tmp_path: Path) -> None:
    report = learned(options(world, tmp_path / "out", steps=0, counts=[30, 10]))
    assert report["test"]["learned"] == report["test"]["weighted average"] != report["test"]["average"]
    assert read_table(tmp_path / "out")[1].values[0][0] == 0.75


def test_the_first_loss_is_that_of_the_average(world: Path, tmp_path: Path) -> None:
    report = learned(options(world, tmp_path / "out", label_share=1.0, steps=0))
    sources = [str(world / "plain" / name) for name in ("client0", "client1")]
    assert main(["linear", "--sources", *sources, "-o", str(tmp_path / "average"), "-q"]) == 0
    module = load_model(
        fetch_checkpoint(str(tmp_path / "average")), f"{world / 'net.py'}:plain", allow_code=True
    ).module
    with np.load(world / "labelled.npz") as data:
        rows = split_rows(400, {"validation": 0.2, "test": 0.2}, 0, "")["validation"]
        inputs, labels = torch.from_numpy(data["x"])[rows], torch.from_numpy(data["labels"])[rows]
    with torch.no_grad():
        expected = float(torch.nn.functional.cross_entropy(module.eval()(inputs), labels))
    assert report["trace"] == [[0, None, pytest.approx(expected, rel=1e-5)]]


def test_bfloat16_is_for_passes_alone_and_resumes(world: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"precision": "bfloat16", "controls": "cheap"}
    whole = learned(options(world, tmp_path / "whole", **changes))
    single = learned(options(world, tmp_path / "single", controls="cheap"))
    assert whole["settings"]["precision"] == "bfloat16"
    found, expected = (np.array(list(report["coefficients"].values())) for report in (whole, single))
    assert np.isfinite(found).all() and not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert abs(whole["trace"][0][2] / single["trace"][0][2] - 1) < 0.02

    def interrupt(what: str, step: int, steps: int, loss: float | None = None) -> None:
        if step == 13:
            raise KeyboardInterrupt

    halved = options(world, tmp_path / "halved", **changes)
    with pytest.raises(KeyboardInterrupt):
        learned(halved, tell=interrupt)
    with pytest.raises(OutputError, match="changed since"):
        learned(options(world, tmp_path / "halved", controls="cheap", resume=True))
    record = tmp_path / "halved" / ".pxmerge" / "journal.jsonl"
    text = record.read_text()
    record.write_text(text[:9])
    with pytest.raises(OutputError, match="cannot be read"):
        learned(halved | {"resume": True})
    record.write_text(text)
    learned(halved | {"resume": True})
    assert read_table(tmp_path / "halved")[1:] == read_table(tmp_path / "whole")[1:]


def test_the_order_of_clients_orders_rows_only(world: Path, tmp_path: Path) -> None:
    plain = options(world, tmp_path / "one", controls="cheap")
    learned(plain)
    learned(plain | {"output": tmp_path / "two", "sources": plain["sources"][::-1]})
    first, second = read_table(tmp_path / "one")[1], read_table(tmp_path / "two")[1]
    np.testing.assert_allclose(first.values, second.values[::-1], rtol=1e-4, atol=1e-6)


def test_streaming_gives_the_same_file(world: Path, tmp_path: Path) -> None:
    for name, stream in (("kept", False), ("streamed", True)):
        changes: dict[str, Any] = {"granularity": "random", "random_groups": 4, "controls": "cheap"}
        learned(options(world, tmp_path / name, stream=stream, **changes))
    one, two = (read_table(tmp_path / name)[1] for name in ("kept", "streamed"))
    assert one == two and len(one.blocks) == 10
    assert "anisotropic_groups" in (tmp_path / "kept" / "recipe.yaml").read_text()
    applied(tmp_path / "kept", tmp_path)


@pytest.mark.parametrize("stop", [7, 13])
def test_resumed_is_uninterrupted(world: Path, tmp_path: Path, stop: int) -> None:
    whole = learned(options(world, tmp_path / "whole", granularity="layer"))

    def interrupt(what: str, step: int, steps: int, loss: float | None = None) -> None:
        if step == stop:
            raise KeyboardInterrupt

    halved = options(world, tmp_path / "halved", granularity="layer")
    with pytest.raises(KeyboardInterrupt):
        learned(halved, tell=interrupt)
    with pytest.raises(OutputError, match="unfinished run"):
        learned(halved)
    with pytest.raises(OutputError, match="changed since"):
        learned(halved | {"resume": True, "seed": 1})
    report = learned(halved | {"resume": True})
    assert report["trace"] == whole["trace"] and report["test"] == whole["test"]
    assert read_table(tmp_path / "halved")[1:] == read_table(tmp_path / "whole")[1:]


@pytest.mark.parametrize("policy", ["reestimate", "mean"])
def test_batch_norm_policies(world: Path, tmp_path: Path, policy: str) -> None:
    report = learned(options(world, tmp_path / "out", "normed", batch_norm=policy, controls="cheap"))
    merged = applied(tmp_path / "out", tmp_path)
    clients = [load_file(world / "normed" / name / "model.safetensors") for name in ("client0", "client1")]
    mean = (clients[0]["norm.running_mean"] + clients[1]["norm.running_mean"]) / 2
    assert torch.allclose(merged["norm.running_mean"], mean, atol=1e-5) == (policy == "mean")
    if policy == "reestimate":
        with np.load(world / "labelled.npz") as data:
            hidden = torch.from_numpy(data["x"]) @ merged["first.weight"].T + merged["first.bias"]
        assert torch.allclose(merged["norm.running_mean"], hidden.mean(dim=0), atol=0.25)
    whole = accuracy(world, "normed", merged, tmp_path, slice(None))
    assert abs(whole - report["test"]["learned"]["accuracy"]) < 12


def test_labels_may_be_left_out(world: Path, tmp_path: Path) -> None:
    report = learned(options(world, tmp_path / "out", data=str(world / "unlabelled.npz")))
    assert set(report["test"]["learned"]) == {"agreement", "divergence"}
    assert "without labels" in report["warnings"][0]
    with pytest.raises(UsageError, match="needs labels"):
        learned(options(world, tmp_path / "two", data=str(world / "unlabelled.npz"), objective="cross-entropy"))


def test_a_poor_teacher_is_warned_of(world: Path, tmp_path: Path) -> None:
    base = str(world / "plain" / "base")
    clients = [base, base]
    report = learned(options(world, tmp_path / "out", sources=clients))
    assert report["teacher"]["agreement"] == 100
    assert any("no better than the plain average" in warning for warning in report["warnings"])


def test_cross_entropy_beats_what_it_began_with(world: Path, tmp_path: Path) -> None:
    report = learned(options(world, tmp_path / "out", objective="cross-entropy", steps=40))
    assert report["teacher"] is None
    assert report["test"]["learned"]["accuracy"] > report["test"]["base"]["accuracy"]
    assert report["trace"][0][2] > report["best_validation_score"]


def test_entropy_stays_within_bounds(world: Path, tmp_path: Path) -> None:
    learned(options(world, tmp_path / "out", objective="entropy", data=world / "unlabelled.npz", learning_rate=0.3))
    values = np.array(read_table(tmp_path / "out")[1].values)
    assert values.min() >= 0 and values.max() <= 1 and not np.allclose(values, 0.3)


def test_negation_unlearns_and_keeps_the_control(world: Path, tmp_path: Path) -> None:
    client = str(world / "plain" / "client0")
    changed = options(
        world,
        tmp_path / "out",
        objective="negation",
        base=str(world / "plain" / "client0"),
        sources=[client.replace("client0", "client1")],
        data=str(world / "low.npz"),
        control_data=str(world / "high.npz"),
        steps=30,
    )
    scores = learned(changed)["test"]
    assert scores["learned"]["accuracy"] < scores["base"]["accuracy"] - 10
    assert scores["learned"]["control accuracy"] >= 0.9 * scores["base"]["control accuracy"]


def test_a_loss_that_is_not_finite_keeps_the_best_before(world: Path, tmp_path: Path) -> None:
    wild = options(world, tmp_path / "out", learning_rate=1e36, clip=None, steps=100, controls="cheap")
    with pytest.raises(DivergedError, match="the best before, are kept"):
        learned(wild)
    assert np.isfinite(read_table(tmp_path / "out")[1].values).all()
    applied(tmp_path / "out", tmp_path)


def test_a_control_that_diverges_leaves_the_coefficients(world: Path, tmp_path: Path, monkeypatch) -> None:
    learned(options(world, tmp_path / "whole", steps=20))
    run = Learner.run

    def broken(self: Learner, state: Path, *given: Any) -> Progress:
        if state.stem == "isotropic":
            raise DivergedError("the loss is nan at step 3")
        return run(self, state, *given)

    monkeypatch.setattr(Learner, "run", broken)
    with pytest.raises(DivergedError, match=r"at step 3 of the isotropic coefficients; .* the best before, are kept"):
        learned(options(world, tmp_path / "out", steps=20))
    files = [tmp_path / folder / "coefficients.safetensors" for folder in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "out" / "recipe.yaml").exists()


def test_bad_data_is_refused(world: Path, tmp_path: Path) -> None:
    rows = {"x": np.zeros((10, 8), np.float32)}
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "names": ({"y": rows["x"], "labels": np.arange(10) % 4}, "its arguments are x"),
        "range": ({**rows, "labels": np.arange(10)}, "labels go from 0 to 9, the model has classes 0 to 3"),
        "one": ({**rows, "labels": np.ones(10, np.int64)}, "one class"),
        "shape": ({"x": np.zeros((10, 5), np.float32), "labels": np.arange(10) % 4}, "cannot take the arrays"),
        "empty": ({"x": np.zeros((0, 8), np.float32), "labels": np.zeros(0, np.int64)}, "no examples"),
        "values": ({**rows, "labels": np.linspace(0, 1, 10)}, "values, not classes"),
        "lone": ({"x": np.zeros((1, 8), np.float32)}, "fewer than two"),
        "nothing": ({}, "no arrays"),
    }
    for name, (arrays, message) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=message):
            learned(options(world, tmp_path / "out", data=str(tmp_path / f"{name}.npz")))
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [1.0]}, "1 counts"),
        ({"counts": [0.0, 0.0]}, "above 0"),
        ({"sources": []}, "at least one source"),
        ({"objective": "negation"}, "control data go together"),
        ({"granularity": "groups"}, "go together"),
        ({"random_groups": 3}, "go together"),
        ({"bounds": (1.0, 0.0)}, "not below"),
        ({"temperature": 0.0}, "above 0"),
        ({"label_share": 1.5}, "must be from 0 to 1"),
        ({"allow_code": False}, "--allow-code"),
    ],
)
def test_options_that_contradict_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        learned(options(world, tmp_path / "out", **changes))


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world / "plain"
    words = ["ofasd", "--base", folder / "base", "--sources", folder / "client0", folder / "client1"]
    words += ["--data", world / "labelled.npz", "--model", f"{world / 'net.py'}:plain", "-o", tmp_path / "out"]
    words += ["--steps", "10", "--counts", "30", "10", "--granularity", "groups", "--groups", "first", "bias"]
    assert main([str(word) for word in words]) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert main([*map(str, words), "--allow-code", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["coefficients"]) == ["first", "bias", "other"]
    assert main([*map(str, words), "--allow-code", "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert "teacher" in shown.err and "weighted average" in shown.err and "recipe.yaml" in shown.err
    assert shown.out == f"{tmp_path / 'out'}\n"
