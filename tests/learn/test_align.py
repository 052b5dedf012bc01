"""``pxmerge align``: exact properties of the rotations, the routes, and runs from files to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_px.cli import main
from mergekit_px.errors import DivergedError, InputError, OutputError, PlanError, TensorMismatchError, UsageError
from mergekit_px.learn.align.direct import gradfix, gradient_signs
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.pieces import Piece, find_pieces
from mergekit_px.learn.align.rotations import Rotations
from mergekit_px.learn.align.routes import CONTROLS
from mergekit_px.learn.align.settings import AlignSettings
from mergekit_px.learn.data import TARGETS
from mergekit_px.learn.life import run_learner
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.ofasd.blend import find_sites
from mergekit_px.plan.inputs import fetch_checkpoint
from mergekit_px.testing.checkpoints import write_checkpoint

MODEL = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.softmax(q @ k.transpose(-1, -2) / 3, dim=-1) @ v)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.attn = Attention(width)
        self.mlp = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        hidden = self.embed(x)
        hidden = hidden + self.attn(hidden)
        return self.head(self.mlp(hidden.mean(dim=1)).relu())


def small():
    return Net(8)


def wide():
    return Net(12)
"""


def train(module: torch.nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of it, the base trained further, and a wider model; a task with three classes."""
    root = tmp_path_factory.mktemp("align")
    (root / "net.py").write_text(MODEL)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    inputs = torch.randn(3, 5, 4, generator=generator)[labels] + torch.randn(300, 5, 4, generator=generator)
    np.savez(root / "task.npz", x=inputs.numpy(), labels=labels.numpy())
    np.savez(root / "few.npz", x=inputs[:60].numpy(), labels=labels[:60].numpy())
    torch.manual_seed(1)
    other = (labels + 1) % 3
    for kind in ("small", "wide"):
        module = load_model(None, f"{root / 'net.py'}:{kind}", allow_code=True).module
        write_checkpoint(root / kind / "base", train(module, inputs[60:120], other[60:120], 10))
        write_checkpoint(root / kind / "further", train(module, inputs[120:180], other[120:180], 5))
        base = load_model(fetch_checkpoint(str(root / kind / "base")), f"{root / 'net.py'}:{kind}", allow_code=True)
        write_checkpoint(root / kind / "tuned", train(base.module, inputs, labels, 40))
    return root


def options(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    small, code = world / "small", f"{world / 'net.py'}:small"
    given = {"base": small / "further", "source_base": small / "base", "source_model": small / "tuned", "model": code}
    given |= {"data": world / "task.npz", "output": output, "device": "cpu", "allow_code": True}
    return {**given, "steps": 10, "evaluate_every": 5, "learning_rate": 0.01, **changes}


def aligned(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The report."""
    return run_learner("align", **settings, **more).report.model_dump(mode="json")


def target(world: Path, dtype: torch.dtype = torch.float64) -> LearningModel:
    model = load_model(fetch_checkpoint(str(world / "small" / "further")), f"{world / 'net.py'}:small", allow_code=True)
    model.module.to(dtype).eval().requires_grad_(False)
    return model


def delta(world: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    base, tuned = (load_file(world / "small" / name / "model.safetensors") for name in ("base", "tuned"))
    return {name: (tuned[name] - base[name]).to(dtype) for name in base}


def turned(rotations: Rotations, seed: int = 0) -> Rotations:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for free in rotations.free.values():
            free.add_(0.3 * torch.randn(free.shape, generator=generator, dtype=torch.float64))
    return rotations


def test_sites(world: Path) -> None:
    model = target(world)
    sites = find_sites(model)
    names = {piece.label for piece in find_pieces(model, sites, "attention", square=True)}
    assert names == {"attn.proj.weight[0:8]", *(f"attn.qkv.weight[{start}:{start + 8}]" for start in (0, 8, 16))}
    every = {piece.tensor for piece in find_pieces(model, sites, "all", square=False)}
    assert every == {"embed.weight", "attn.qkv.weight", "attn.proj.weight", "mlp.weight", "head.weight"}
    assert {piece.tensor for piece in find_pieces(model, sites, "all", square=True)} == {
        "attn.qkv.weight",
        "attn.proj.weight",
    }


@pytest.mark.parametrize("parametrisation", ["soft", "cayley", "polar"])
@pytest.mark.parametrize("sided", ["one", "two"])
def test_rotations(world: Path, parametrisation: Any, sided: Any) -> None:
    settings = AlignSettings(parametrisation=parametrisation, sided=sided)
    pieces = [Piece("attn.qkv.weight", start, start + 8, 8) for start in (0, 8, 16)]
    deltas = delta(world)
    rotations = Rotations(pieces, settings, torch.device("cpu"), torch.float64)
    for name, moved in rotations.transport(deltas).items():
        torch.testing.assert_close(moved, deltas[name], rtol=1e-12, atol=1e-15)
    turned(rotations)
    if parametrisation != "cayley":
        rotations.retract()
    assert rotations.orthogonality_error() < 1e-12 and max(rotations.distances().values()) > 0.3
    moved = rotations.transport(deltas)["attn.qkv.weight"].detach()
    matrices = rotations.matrices()
    for start in (0, 8, 16):
        before, after = deltas["attn.qkv.weight"][start : start + 8], moved[start : start + 8]
        label = f"attn.qkv.weight[{start}:{start + 8}]"
        left, right = (
            (matrices[f"{label}.both"],) * 2 if sided == "one" else (matrices[f"{label}.out"], matrices[f"{label}.in"])
        )
        np.testing.assert_allclose(after.numpy(), left.numpy().T @ before.numpy() @ right.numpy(), atol=1e-12)
        torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(after, before)


def test_the_penalty_is_the_mean_defect() -> None:
    pieces = [Piece("a", 0, 3, 3), Piece("b", 0, 3, 3)]
    rotations = turned(Rotations(pieces, AlignSettings(orthogonality=2.0), torch.device("cpu"), torch.float64))
    defects = [np.linalg.norm(u.numpy().T @ u.numpy() - np.eye(3)) for u in rotations.matrices().values()]
    penalty = rotations.penalty()
    assert isinstance(penalty, Tensor) and penalty.item() == pytest.approx(2 * np.mean(defects))
    fresh = Rotations(pieces, AlignSettings(), torch.device("cpu"), torch.float64)
    smooth = fresh.penalty()
    assert isinstance(smooth, Tensor)
    gradients = torch.autograd.grad(smooth, list(fresh.free.values()))
    assert smooth.item() == 0 and all(bool(torch.isfinite(one).all()) for one in gradients)


@pytest.mark.parametrize("parametrisation", ["soft", "cayley"])
def test_gradient_of_the_rotations_by_finite_differences(world: Path, parametrisation: Any) -> None:
    model = target(world)
    sites = find_sites(model)
    changed = ChangedModel(model, sites)
    settings = AlignSettings(parametrisation=parametrisation, sided="two", sites="all")
    pieces = find_pieces(model, sites, "all", square=False)
    rotations = turned(Rotations(pieces, settings, torch.device("cpu"), torch.float64))
    with np.load(world / "task.npz") as data:
        batch = {"x": torch.from_numpy(data["x"][:8]).double(), TARGETS: torch.from_numpy(data["labels"][:8])}

    def loss() -> Tensor:
        return changed.loss(rotations.transport(delta(world)), batch) + rotations.penalty()

    gradients = torch.autograd.grad(loss(), list(rotations.free.values()))
    for free, gradient in list(zip(rotations.free.values(), gradients, strict=True))[:5]:
        found = []
        for sign in (1, -2):
            with torch.no_grad():
                free[0, 1] += sign * 1e-5
                found.append(loss().item())
        with torch.no_grad():
            free[0, 1] += 1e-5
        assert gradient[0, 1].item() == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("majority", [True, False])
def test_gradfix_only_lowers_the_loss_to_first_order(world: Path, majority: bool) -> None:
    model = target(world)
    changed = ChangedModel(model, find_sites(model))
    with np.load(world / "task.npz") as data:
        batch = {"x": torch.from_numpy(data["x"][:7]).double(), TARGETS: torch.from_numpy(data["labels"][:7])}
    deltas = delta(world)
    masked = gradfix(deltas, gradient_signs(changed, [batch], deltas, majority=majority))
    plain = target(world).module.requires_grad_(True)
    singles = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(7)]
    votes = {name: torch.zeros_like(tensor) for name, tensor in deltas.items()}
    for one in singles if majority else [batch]:
        plain.zero_grad()
        torch.nn.functional.cross_entropy(plain(one["x"]), one[TARGETS]).backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            votes[name] -= parameter.grad.sign() if majority else parameter.grad
    for name, tensor in deltas.items():
        expected = np.where(np.sign(tensor.numpy()) == np.sign(votes[name].numpy()), tensor.numpy(), 0)
        np.testing.assert_array_equal(masked[name].numpy(), expected)
    kept = torch.cat([(masked[name] != 0).flatten() for name in deltas]).double().mean()
    assert 0.2 < kept < 0.9


def test_a_run_writes_what_fits_together(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = aligned(options(world, out))
    assert list(report["test"]) == [
        "zero-shot", "naive", "aligned", "sham", "few-shot fine-tune", "fine-tune from naive"
    ]  # fmt: skip
    assert report["rotations"]["matrices"] == 4 and report["rotations"]["orthogonality_error"] < 0.5
    assert report["examples"] == {"train": 150, "validation": 60, "test": 90} and report["left_out"] == []
    assert not (out / ".align").exists() and json.loads((out / "report.json").read_text()) == report
    base, model, vector = (
        load_file(folder / "model.safetensors")
        for folder in (world / "small" / "further", out / "model", out / "task_vector")
    )
    matrices = load_file(out / "rotations.safetensors")
    change = delta(world, torch.float32)
    turn = matrices["attn.proj.weight[0:8].both"]
    torch.testing.assert_close(vector["attn.proj.weight"], turn.T @ change["attn.proj.weight"] @ turn)
    torch.testing.assert_close(vector["mlp.weight"], change["mlp.weight"])
    for name, tensor in base.items():
        torch.testing.assert_close(model[name], tensor + vector[name], rtol=1e-6, atol=1e-7)
    words = ["add", str(world / "small" / "further"), str(out / "task_vector"), "-o", str(tmp_path / "sum"), "-q"]
    assert main(words) == 0
    words[1] = str(world / "small" / "base")
    assert main([*words[:-2], str(tmp_path / "wrong"), "-q"]) == 4


def test_identity_rotations_are_the_naive_transfer(world: Path, tmp_path: Path) -> None:
    report = aligned(options(world, tmp_path / "out", steps=0))
    assert report["test"]["aligned"] == report["test"]["naive"]
    assert report["test"]["few-shot fine-tune"] == report["test"]["zero-shot"]
    assert report["norm"]["after"] == pytest.approx(report["norm"]["before"])
    assert {entry["scale"]: entry["aligned"] for entry in report["scales"]}.keys() == {n / 4 for n in range(9)}


@pytest.mark.parametrize(
    "changes",
    [
        {"parametrisation": "cayley", "sided": "two", "sites": "all"},
        {"parametrisation": "polar"},
        {"project": True},
    ],
)
def test_norm_and_spectrum_stay(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    report = aligned(options(world, tmp_path / "out", **changes))
    assert report["rotations"]["orthogonality_error"] < 1e-4 and report["rotations"]["spectrum_distance"] < 1e-4
    assert report["rotations"]["mean_distance_from_identity"] > 1e-3
    assert report["norm"]["after"] == pytest.approx(report["norm"]["before"], rel=1e-5)


def test_training_lowers_the_loss(world: Path, tmp_path: Path) -> None:
    report = aligned(options(world, tmp_path / "out", steps=40))
    assert min(entry[2] for entry in report["trace"]) < report["trace"][0][2]
    assert report["test"]["few-shot fine-tune"] > report["test"]["zero-shot"]


@pytest.mark.parametrize("route", ["gradfix", "theseus"])
def test_direct_routes(world: Path, tmp_path: Path, route: str) -> None:
    report = aligned(options(world, tmp_path / "out", route=route, steps=0))
    assert report["norm"]["after"] < report["norm"]["before"] * 1.001 and report["rotations"] is None
    assert not (tmp_path / "out" / "rotations.safetensors").exists()
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_theseus_goes_across_widths(world: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "base": str(world / "wide" / "base"),
        "model": f"{world / 'net.py'}:wide",
        "source_code": f"{world / 'net.py'}:small",
    }
    report = aligned(options(world, tmp_path / "out", route="theseus", steps=0, **changes))
    assert report["left_out"] == [] and report["norm"]["after"] > 0
    vector = load_file(tmp_path / "out" / "task_vector" / "model.safetensors")
    assert vector["attn.qkv.weight"].shape == (36, 12) and torch.linalg.matrix_rank(vector["attn.proj.weight"]) <= 8
    with pytest.raises(UsageError, match="no matrix to rotate"):
        aligned(options(world, tmp_path / "two", **changes))


@pytest.mark.parametrize("stop", [7, 17])
def test_resumed_is_uninterrupted(world: Path, tmp_path: Path, stop: int) -> None:
    whole = aligned(options(world, tmp_path / "whole"))
    calls = 0

    def interrupt(what: str, step: int, steps: int, loss: float | None = None) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    halved = options(world, tmp_path / "halved")
    with pytest.raises(KeyboardInterrupt):
        aligned(halved, tell=interrupt)
    with pytest.raises(OutputError, match="unfinished run"):
        aligned(halved)
    report = aligned(halved | {"resume": True})
    assert report["trace"] == whole["trace"] and report["test"] == whole["test"]
    for file in ("rotations.safetensors", "task_vector/model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "halved" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_bfloat16_is_for_passes_alone_and_resumes(world: Path, tmp_path: Path) -> None:
    whole = aligned(options(world, tmp_path / "whole", precision="bfloat16"))
    single = aligned(options(world, tmp_path / "single"))
    assert whole["settings"]["precision"] == "bfloat16" and single["settings"]["precision"] == "float32"
    half, full = (load_file(tmp_path / name / "rotations.safetensors") for name in ("whole", "single"))
    assert {one.dtype for one in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], one) for name, one in full.items())
    for name, one in full.items():
        torch.testing.assert_close(half[name], one, rtol=0, atol=0.1)
    assert 0 < abs(whole["trace"][0][2] / single["trace"][0][2] - 1) < 0.02

    def interrupt(what: str, step: int, steps: int, loss: float | None = None) -> None:
        if step == 7:
            raise KeyboardInterrupt

    halved = options(world, tmp_path / "halved", precision="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        aligned(halved, tell=interrupt)
    with pytest.raises(OutputError, match="another plan"):
        aligned(options(world, tmp_path / "halved", resume=True))
    aligned(halved | {"resume": True})
    names = [tmp_path / folder / "rotations.safetensors" for folder in ("whole", "halved")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("route", ["theseus", "gradfix"])
def test_bfloat16_reaches_the_routes_that_train_nothing(world: Path, tmp_path: Path, route: str) -> None:
    changes: dict[str, Any] = {"route": route, "steps": 0}
    for name in ("bfloat16", "float32"):
        aligned(options(world, tmp_path / name, precision=name, **changes))
    half, full = (load_file(tmp_path / name / "task_vector" / "model.safetensors") for name in ("bfloat16", "float32"))
    assert {one.dtype for one in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], one) for name, one in full.items())


def test_a_loss_that_is_not_finite_keeps_the_best_before(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="the best before, is kept"):
        aligned(options(world, tmp_path / "out", learning_rate=1e30, steps=30))
    vector = load_file(tmp_path / "out" / "task_vector" / "model.safetensors")
    torch.testing.assert_close(vector["mlp.weight"], delta(world, torch.float32)["mlp.weight"])


def test_what_does_not_belong_together_is_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, message in (
        ({"source_model": None}, "either a source model or a task vector"),
        ({"task_vector": "x"}, "either a source model or a task vector"),
        ({"source_base": None}, "source base is needed"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"project": True, "parametrisation": "cayley"}, "orthogonal already"),
        ({"source_model": None, "task_vector": str(world / "small" / "tuned")}, "it holds weights"),
    ):
        with pytest.raises(UsageError, match=message):
            aligned(options(world, out, **changes))
    with pytest.raises(TensorMismatchError):
        aligned(options(world, out, source_model=str(world / "wide" / "tuned")))
    words = ["subtract", str(world / "small" / "tuned"), str(world / "small" / "base"), "-o", str(tmp_path / "tau")]
    assert main([*words, "-q"]) == 0
    vector: dict[str, Any] = {"source_model": None, "task_vector": str(tmp_path / "tau")}
    with pytest.raises(PlanError, match="another base"):
        aligned(options(world, out, **vector, source_base=str(world / "small" / "further")))
    aligned(options(world, out, **vector, source_base=None, steps=0))


def test_several_tasks_are_one_task_whose_vector_is_their_sum(world: Path, tmp_path: Path) -> None:
    tasks = [str(world / "small" / name) for name in ("tuned", "further")]
    rows = dict(np.load(world / "task.npz"))
    for name, part in (("first", slice(0, 120)), ("second", slice(120, 300))):
        np.savez(tmp_path / f"{name}.npz", **{key: array[part] for key, array in rows.items()})
    files = [str(tmp_path / "first.npz"), str(tmp_path / "second.npz")]
    report = aligned(options(world, tmp_path / "several", source_model=tasks, data=files))
    base, *tuned = (load_file(Path(folder, "model.safetensors")) for folder in (world / "small" / "base", *tasks))
    total = {name: base[name] + sum(one[name] - base[name] for one in tuned) for name in base}
    write_checkpoint(tmp_path / "total", total)
    single = aligned(options(world, tmp_path / "one", source_model=tmp_path / "total"))
    assert report["examples"] == single["examples"] and report["test"] == single["test"]
    vectors = [load_file(tmp_path / name / "task_vector" / "model.safetensors") for name in ("several", "one")]
    for name, value in vectors[0].items():
        torch.testing.assert_close(value, vectors[1][name], atol=1e-5, rtol=1e-4)
    for task in tasks:
        assert main(["subtract", task, str(world / "small" / "base"), "-o", str(tmp_path / Path(task).name), "-q"]) == 0
    vectors_given = {"source_model": None, "task_vector": [str(tmp_path / Path(task).name) for task in tasks]}
    again = aligned(options(world, tmp_path / "vectors", **vectors_given, data=files))
    assert again["test"] == report["test"]
    np.savez(tmp_path / "other.npz", x=rows["x"][:9, :3], labels=rows["labels"][:9])
    with pytest.raises(InputError, match="in a row"):
        aligned(options(world, tmp_path / "wrong", source_model=tasks, data=[files[0], str(tmp_path / "other.npz")]))


@pytest.mark.parametrize("changes", [{}, {"parametrisation": "cayley", "sided": "two", "sites": "all"}])
def test_matrices_are_used_again_without_data(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    first = aligned(options(world, tmp_path / "out", **changes))
    again = options(world, tmp_path / "again", data=None, maps=str(tmp_path / "out"), model=None)
    report = aligned(again)
    assert report["test"] == {} and report["scales"] == [] and set(report["not_scored"]) == set(CONTROLS)
    one, two = (load_file(tmp_path / name / "task_vector" / "model.safetensors") for name in ("out", "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-7)
    scored = aligned(options(world, tmp_path / "scored", maps=str(tmp_path / "out"), steps=1))
    assert set(scored["test"]) == set(CONTROLS)
    untrained = ("zero-shot", "naive", "aligned")
    assert len({first["test"][name] for name in untrained[:2]}) == 2
    assert [scored["test"][name] for name in untrained] == [first["test"][name] for name in untrained]
    with pytest.raises(PlanError, match="made for another target base"):
        aligned(again | {"output": tmp_path / "no", "base": str(world / "small" / "base")})
    with pytest.raises(UsageError, match="needs labelled examples"):
        aligned(again | {"output": tmp_path / "no", "maps": None})


def test_signs_are_used_again_without_data(world: Path, tmp_path: Path) -> None:
    aligned(options(world, tmp_path / "out", route="gradfix", steps=0))
    signs = load_file(tmp_path / "out" / "signs.safetensors")
    assert {one.dtype for one in signs.values()} == {torch.int8} and signs.keys() == delta(world).keys()
    aligned(options(world, tmp_path / "again", data=None, maps=str(tmp_path / "out"), model=None))
    one, two = (load_file(tmp_path / name / "task_vector" / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(bool((tensor.sign() * signs[name] >= 0).all()) for name, tensor in two.items())


def test_maps_between_widths_are_used_again_without_data(world: Path, tmp_path: Path) -> None:
    wide = str(world / "wide" / "base")
    codes = {"model": f"{world / 'net.py'}:wide", "source_code": f"{world / 'net.py'}:small"}
    aligned(options(world, tmp_path / "out", route="theseus", steps=0, base=wide, **codes))
    maps = load_file(tmp_path / "out" / "maps.safetensors")
    assert maps["attn.qkv[8:16].outputs"].shape == (8, 12) and maps["embed[0:8].inputs"].shape == (4, 4)
    again = options(world, tmp_path / "again", data=None, maps=str(tmp_path / "out"), base=wide, model=None)
    assert aligned(again)["left_out"] == []
    for folder in ("task_vector", "model"):
        one, two = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("out", "again"))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_scales_of_one_s_own(world: Path, tmp_path: Path) -> None:
    report = aligned(options(world, tmp_path / "out", steps=0, scales=(0.0, 0.3)))
    assert [entry["scale"] for entry in report["scales"]] == [0.0, 0.3]
    with pytest.raises(UsageError, match="finite"):
        aligned(options(world, tmp_path / "no", scales=(float("nan"),)))


def test_a_model_without_its_head_is_refused(world: Path, tmp_path: Path) -> None:
    for part in ("base", "source_base", "source_model"):
        tensors = load_file(Path(options(world, tmp_path)[part]) / "model.safetensors")
        headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        write_checkpoint(tmp_path / part, headless)
        with pytest.raises(TensorMismatchError, match=r"it lacks head\.|the base has no head\.") as caught:
            aligned(options(world, tmp_path / "out", **{part: str(tmp_path / part)}))
        assert str(tmp_path / part) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = world / "small"
    words = ["align", "--source-base", small / "base", "--source-model", small / "tuned", "--base"]
    words += [small / "further", "--data", world / "few.npz", "--test", world / "task.npz", "--steps", "5"]
    words += ["--model", f"{world / 'net.py'}:small", "-o", tmp_path / "out", "--param", "cayley", "--allow-code"]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    for control in ("zero-shot", "naive", "sham", "few-shot fine-tune", "fine-tune from naive"):
        assert control in shown.err
    assert "300 test examples" in shown.err
