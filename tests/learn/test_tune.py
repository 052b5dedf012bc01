"""``pxmerge tune``: exact gradients and invariants, resume, the choice by validation, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_px.learn.training as training
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.cli import main
from mergekit_px.errors import TensorMismatchError, UsageError
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.state import StateFile
from mergekit_px.learn.tune.components import Factors, read_components
from mergekit_px.learn.tune.settings import TuneReport
from mergekit_px.learn.tune.substitution import TunedValues, decomposed
from mergekit_px.testing import write_checkpoint

CODE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.last = nn.Linear(24, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x[:, None])).flatten(1))

def small():
    return Small()
"""
RANK = 3
MATRICES = {"conv.weight": (4, 3), "last.weight": (3, 24)}


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """Code, base, components of rank 3 for two tensors with a bias beside them, and data of three classes."""
    places = {name: tmp_path / name for name in ("code.py", "base", "components.safetensors", "data.npz")}
    places["code.py"].write_text(CODE)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(CODE, namespace)
    write_checkpoint(places["base"], namespace["small"]().state_dict())
    write_components(places)
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    x = rng.normal(size=(120, 6)).astype(np.float32) + 2 * np.eye(3, 6, dtype=np.float32)[labels]
    np.savez(places["data.npz"], x=x, labels=labels)
    return places


def write_components(made: dict[str, Path], base: str | None = None) -> None:
    tensors = {"last.bias.delta": torch.tensor([0.1, -0.2, 0.3])}
    generator = torch.Generator().manual_seed(1)
    for name, (rows, columns) in MATRICES.items():
        u, s, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
        tensors |= {f"{name}.U": u[:, :RANK], f"{name}.S": s[:RANK], f"{name}.V": v[:RANK].T}
    path = made["base"]
    kept = open_checkpoint(path)
    reader = open_reader(kept)
    metadata = {"pxmerge.kind": "components", "pxmerge.base_fingerprint": base or fingerprint(kept, reader)}
    reader.close()
    save_file({name: one.contiguous() for name, one in tensors.items()}, made["components.safetensors"], metadata)


def loaded(made: dict[str, Path]) -> LearningModel:
    model = load_model(open_checkpoint(made["base"]), f"{made['code.py']}:small", allow_code=True)
    model.module.eval().requires_grad_(False)
    return model


def values_of(made: dict[str, Path], **options: object) -> TunedValues:
    return TunedValues(loaded(made), read_components(made["components.safetensors"]), **options)


def dense_update(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[f"{name}.U"].double() @ torch.diag(tensors[f"{name}.S"].double()) @ tensors[f"{name}.V"].double().T


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("top", [None, 1, 2])
def test_untouched_values_give_the_base_and_the_whole_update(made, top: int | None, core: bool) -> None:
    values = values_of(made, top=top, core=core)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    before = values.model.module(x=x)
    values.write()
    torch.testing.assert_close(values.model.module(x), before)
    base, update = load_file(made["base"] / "model.safetensors"), load_file(made["components.safetensors"])
    found = values.model.tensors()
    for name in MATRICES:
        expected = base[name].double() + dense_update(update, name).view(base[name].shape)
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["last.bias"], base["last.bias"] + update["last.bias.delta"])
    torch.testing.assert_close(found["conv.bias"], base["conv.bias"])


@pytest.mark.parametrize("core", [False, True])
def test_gradients_are_projections_of_the_dense_gradient_and_finite_differences(made, core: bool) -> None:
    model = loaded(made)
    model.module.double()
    values = TunedValues(model, read_components(made["components.safetensors"]), top=2, core=core)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss() -> torch.Tensor:
        return values.model.module(x=x).log_softmax(-1)[:, 0].sum()

    loss().backward()
    gradient = values.values.grad.clone()
    with torch.no_grad():
        for index in range(len(gradient)):
            kept = float(values.values[index])
            ends = []
            for step in (1e-6, -1e-6):
                values.values[index] = kept + step
                ends.append(float(loss()))
            values.values[index] = kept
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)
    module = loaded(made).module.double()
    whole = values_of(made)
    whole.write()
    module.load_state_dict(whole.model.module.double().state_dict())
    weight = module.last.weight.requires_grad_()
    module(x).log_softmax(-1)[:, 0].sum().backward()
    update = load_file(made["components.safetensors"])
    u, v = (update[f"last.weight.{part}"].double()[:, :2] for part in "UV")
    unit = 2.0 ** round(math.log2(float(update["last.weight.S"][:2].square().mean().sqrt())))
    projected = u.T @ weight.grad @ v * unit
    count = 4 if core else 2
    torch.testing.assert_close(
        gradient[-count:], projected.flatten() if core else projected.diagonal(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("core", [False, True])
def test_a_step_moves_values_of_every_size_by_the_same_share(made, core: bool) -> None:
    shares = []
    for factor in (1.0, 2.0**-9):
        components = read_components(made["components.safetensors"])
        smaller = {
            label: dataclasses.replace(each, values=each.values * factor) for label, each in components.factors.items()
        }
        values = TunedValues(loaded(made), dataclasses.replace(components, factors=smaller), core=core)
        values.values.grad = torch.ones_like(values.values)
        torch.optim.AdamW([values.values], lr=0.1, weight_decay=0.1).step()
        shares.append(values.changes())
    assert shares[0] == shares[1]
    assert all(0.05 < share < 0.6 for share in shares[0].values()), shares[0]


@pytest.mark.parametrize("core", [False, True])
def test_the_artefact_is_the_update_of_the_model(made, tmp_path: Path, core: bool) -> None:
    values = values_of(made, top=2, core=core, match=("last*",))
    with torch.no_grad():
        values.values += torch.randn(values.values.shape, generator=torch.Generator().manual_seed(3))
    artefact = values.artefact()
    values.write()
    base, found = load_file(made["base"] / "model.safetensors"), values.model.tensors()
    for name in MATRICES:
        update = (found[name] - base[name]).flatten(1)
        torch.testing.assert_close(update.double(), dense_update(artefact, name), rtol=1e-4, atol=1e-5)
    before = load_file(made["components.safetensors"])
    assert torch.equal(artefact["conv.weight.S"], before["conv.weight.S"])
    assert not torch.equal(artefact["last.weight.S"], before["last.weight.S"])
    assert torch.equal(artefact["last.bias.delta"], before["last.bias.delta"])


def test_a_pool_of_several_models_is_decomposed_first(made) -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(9, 5, generator=generator), torch.randn(8, 5, generator=generator)
    left[:, 4], right[:, 4] = left[:, 3], right[:, 3]  # rank 4
    pool = Factors(left, torch.tensor([3.0, 2.0, 1.0, 0.5, 0.5]), right)
    padded = Factors(
        torch.cat([left, torch.zeros(9, 2)], 1),
        torch.cat([pool.values, torch.zeros(2)]),
        torch.cat([right, torch.zeros(8, 2)], 1),
    )
    u, s, v = np.linalg.svd(((left.double() * pool.values) @ right.double().T).numpy())
    for given in (pool, padded):
        found = decomposed(given)
        np.testing.assert_allclose(found.values, s[:4], rtol=1e-5)
        unit = np.eye(4)
        np.testing.assert_allclose(found.left.T @ found.left, unit, atol=1e-5)
        np.testing.assert_allclose(found.right.T @ found.right, unit, atol=1e-5)
        np.testing.assert_allclose((found.left * found.values) @ found.right.T, u[:, :4] * s[:4] @ v[:4], atol=1e-4)
    again = decomposed(found)
    assert again.left is found.left and again.right is found.right


STACKED = """
import torch
from torch import nn

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 6, 3))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, torch.tanh(self.experts))
"""


@pytest.mark.parametrize(("core", "top"), [(False, None), (False, 1), (True, 2)])
def test_a_stack_of_matrices_is_tuned_matrix_by_matrix(tmp_path: Path, core: bool, top: int | None) -> None:
    torch.manual_seed(0)
    (tmp_path / "code.py").write_text(STACKED)
    base, update = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    update[2] = torch.outer(torch.randn(6), torch.randn(3))  # one component less than the others
    write_checkpoint(tmp_path / "base", {"experts": base})
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    tensors = {"experts.U": u, "experts.S": s, "experts.V": vt.mT}
    save_file(
        {name: one.contiguous() for name, one in tensors.items()},
        tmp_path / "c.safetensors",
        {"pxmerge.kind": "components"},
    )
    model = load_model(open_checkpoint(tmp_path / "base"), f"{tmp_path / 'code.py'}:Experts", allow_code=True)
    tuned = TunedValues(model, read_components(tmp_path / "c.safetensors"), top=top, core=core)
    x = torch.randn(5, 6)
    wanted = torch.einsum("bi,eio->bo", x, torch.tanh(base + update))
    torch.testing.assert_close(tuned.model.module(x=x), wanted)
    tuned.model.module(x=x).square().sum().backward()
    assert tuned.values.grad is not None and bool((tuned.values.grad != 0).any())
    with torch.no_grad():
        tuned.values *= 0.5
    artefact = tuned.artefact()
    save_file(artefact, tmp_path / "again.safetensors", {"pxmerge.kind": "components"})
    again = read_components(tmp_path / "again.safetensors")
    stored = torch.einsum("emk,ek,enk->emn", *(artefact[f"experts.{part}"] for part in "USV"))
    tuned.write()
    torch.testing.assert_close(model.module.experts.detach(), base + stored)
    if top is None:
        torch.testing.assert_close(stored, 0.5 * update)
    assert list(again.factors) == [f"experts[{place}]" for place in range(4)]


def test_a_stack_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(STACKED)
    write_checkpoint(tmp_path / "base", {"experts": torch.zeros(4, 6, 3)})
    shapes = {"experts.U": (3, 6, 2), "experts.S": (3, 2), "experts.V": (3, 3, 2)}
    save_file(
        {name: torch.ones(shape) for name, shape in shapes.items()},
        tmp_path / "c.safetensors",
        {"pxmerge.kind": "components"},
    )
    model = load_model(open_checkpoint(tmp_path / "base"), f"{tmp_path / 'code.py'}:Experts", allow_code=True)
    with pytest.raises(TensorMismatchError, match=r"the update of experts is \[3, 6, 3\] and the tensor \[4, 6, 3\]"):
        TunedValues(model, read_components(tmp_path / "c.safetensors"))


def test_what_is_trained_does_not_depend_on_how_many_were_merged(made) -> None:
    assert len(values_of(made).values) == 2 * RANK
    assert len(values_of(made, top=2).values) == 4
    assert len(values_of(made, top=2, core=True).values) == 8
    assert len(values_of(made, match=("conv*",)).values) == RANK


def test_components_that_do_not_fit(made) -> None:
    with pytest.raises(UsageError, match="4 singular values are to be trained and 3 are the most"):
        values_of(made, top=4)
    with pytest.raises(UsageError, match="no matrix is called"):
        values_of(made, match=("attention*",))
    tensors = load_file(made["components.safetensors"])
    changed = {name.replace("last.weight", "head.weight"): one for name, one in tensors.items()}
    save_file(changed, made["components.safetensors"], {"pxmerge.kind": "components"})
    with pytest.raises(TensorMismatchError, match=r"no head\.weight"):
        values_of(made)
    changed = tensors | {"last.weight.V": tensors["last.weight.V"][:5].contiguous()}
    save_file(changed, made["components.safetensors"], {"pxmerge.kind": "components"})
    with pytest.raises(TensorMismatchError, match=r"is \[3, 5\] and the tensor \[3, 24\]"):
        values_of(made)


def command(made: dict[str, Path], output: Path, *words: object) -> int:
    given = ["tune", made["components.safetensors"], "--base", made["base"], "--data", made["data.npz"], "-o", output]
    given += ["--model", f"{made['code.py']}:small", "--allow-code", "--batch", 16, "--steps", 24, "--device", "cpu"]
    return main([str(word) for word in (*given, *words)])


def test_the_command_trains_and_writes_all_three(made, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert command(made, out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert TuneReport.model_validate({name: one for name, one in report.items() if name != "output"})
    assert report["scores"] == json.loads((out / "report.json").read_text())["scores"]
    assert report["examples"] == {"train": 72, "validation": 24, "test": 24}
    scores = report["scores"]
    assert scores["tuned"]["validation"]["accuracy"] > scores["components"]["validation"]["accuracy"]
    assert scores["tuned"]["validation"]["loss"] < scores["components"]["validation"]["loss"]
    assert set(scores) == {"base", "components", "tuned"} and set(scores["base"]) == {"validation", "test"}
    base, merged = (load_file(place / "model.safetensors") for place in (made["base"], out / "model"))
    artefact = load_file(out / "components.safetensors")
    expected = base["last.weight"].double() + dense_update(artefact, "last.weight")
    torch.testing.assert_close(merged["last.weight"], expected.float(), rtol=1e-5, atol=1e-5)
    assert not (out / "state.safetensors").exists()
    assert read_components(out / "components.safetensors").base_fingerprint
    again = tmp_path / "again"
    assert command(made, again, "-q") == 0
    for name in ("components.safetensors", "report.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_a_resumed_run_equals_one_that_was_not_stopped(made, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(made, whole, "-q") == 0
    look = training.Training._look
    calls = []

    def interrupted(self: training.Training, loss: float | None) -> None:
        calls.append(loss)
        if len(calls) == 4:
            raise KeyboardInterrupt
        look(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_look", interrupted)
        patch.setattr(StateFile, "due", True)
        assert command(made, stopped, "-q") == 130
    assert command(made, stopped, "-q") == 4 and "--resume" in capsys.readouterr().err
    assert command(made, stopped, "-q", "--resume", "--learning-rate", 0.2) == 4
    assert "another plan" in capsys.readouterr().err
    made["code.py"].write_text(CODE + "\n")  # other code makes another model
    assert command(made, stopped, "-q", "--resume") == 4 and "another plan" in capsys.readouterr().err
    made["code.py"].write_text(CODE)
    assert command(made, stopped, "-q", "--resume") == 0
    for name in ("components.safetensors", "report.json", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    assert command(made, stopped, "-q", "--resume") == 4


def test_bfloat16_is_for_passes_alone_and_resumes(made, tmp_path: Path, monkeypatch) -> None:
    whole, stopped, single = tmp_path / "whole", tmp_path / "stopped", tmp_path / "single"
    words = ("-q", "--precision", "bfloat16")
    assert command(made, whole, *words) == 0 and command(made, single, "-q") == 0
    assert json.loads((whole / "report.json").read_text())["settings"]["precision"] == "bfloat16"
    half, full = (load_file(place / "components.safetensors")["last.weight.S"] for place in (whole, single))
    assert half.dtype == torch.float32 and bool(half.isfinite().all())
    assert not torch.equal(half, full) and torch.allclose(half, full, atol=0.2)
    step, calls = training.Training.learn, []

    def interrupted(self: training.Training) -> float:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "learn", interrupted)
        patch.setattr(StateFile, "due", True)
        assert command(made, stopped, *words) == 130
    assert command(made, stopped, "-q", "--resume") == 4
    assert command(made, stopped, *words, "--resume") == 0
    for name in ("components.safetensors", "report.json", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


def test_a_loss_that_is_no_number_keeps_the_last_good_artefact(made, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    step = training.Training.learn

    def broken(self: training.Training) -> float:
        if self.progress.step == 10:
            with torch.no_grad():
                self.free["values"].fill_(float("nan"))
        return step(self)

    monkeypatch.setattr(training.Training, "learn", broken)
    assert command(made, out, "-q") == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the loss is nan at step 11" in error and "--learning-rate" in error
    report = json.loads((out / "report.json").read_text())
    assert report["stopped"] and report["selected_step"] in (4, 8)
    assert torch.isfinite(load_file(out / "components.safetensors")["last.weight.S"]).all()
    assert (out / "model" / "model.safetensors").exists()


def test_values_that_only_get_worse_are_not_taken(made, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert command(made, out, "--learning-rate", "0") == 0
    assert "kept as they came" in capsys.readouterr().err
    before, after = load_file(made["components.safetensors"]), load_file(out / "components.safetensors")
    torch.testing.assert_close(after["last.weight.S"], before["last.weight.S"], rtol=0, atol=0)
    assert json.loads((out / "report.json").read_text())["selected_step"] == 0


def test_bad_input(made, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"

    def refused(code: int, *words: object) -> str:
        assert command(made, out, *words) == code and not out.exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "share" in refused(2, "--test", "1.5")
    before = (made["base"] / "model.safetensors").read_bytes()
    assert command(made, made["base"], "--overwrite") == 4
    assert "lies in the input" in capsys.readouterr().err
    assert (made["base"] / "model.safetensors").read_bytes() == before
    assert "no such data file" in refused(3, "--validation", tmp_path / "none.npz")
    assert "--validation" in refused(3, "--validation", "0")
    data = dict(np.load(made["data.npz"]))
    np.savez(made["data.npz"], x=data["x"], labels=data["labels"] + 1)
    assert "labels go from 1 to 3" in refused(3)
    np.savez(made["data.npz"], pixels=data["x"], labels=data["labels"])
    assert "its arguments are x" in refused(3)
    np.savez(made["data.npz"], **data)
    write_components(made, base="0" * 64)
    assert "another base" in refused(3)
    assert command(made, out, "--allow-base-mismatch", "-q") == 0
    save_file({"last.weight.U": torch.ones(3, 2)}, made["components.safetensors"], {"pxmerge.kind": "components"})
    assert command(made, tmp_path / "two") == 3 and "has no .S" in capsys.readouterr().err
    save_file({"w": torch.ones(3)}, made["components.safetensors"])
    assert command(made, tmp_path / "two") == 3 and "does not hold components" in capsys.readouterr().err
