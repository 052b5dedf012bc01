"""Each learner on language models: against plain loops, and on texts that nothing was chosen on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from mergekit_px.cli import main
from mergekit_px.learn.data import IGNORED, Examples, shuffled, split_rows
from mergekit_px.learn.ofasd import ensemble

from .conftest import MAKERS, NEXT, VOCABULARY, learned, mixed, numbers, ofasd, save_arrays, task
from .conftest import save as store

TWO = pytest.mark.parametrize("family", ["llama", "t5"], indirect=True)


def token_losses(kind: str, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of every label that counts, one after another."""
    return functional.cross_entropy(*counted_tokens(kind, logits, batch), reduction="none")


def counted_tokens(kind: str, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    labels = batch["labels"]
    if kind in NEXT:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return logits[counted], labels[counted]


def test_coefficients_are_those_of_a_plain_loop(world: str) -> None:
    report = ofasd("data.npz", "out", "--objective", "cross-entropy", "--granularity", "model")
    arrays = mixed(world, 60, 7)
    rows = split_rows(60, {"validation": 0.2, "test": 0.2}, 0, "data")
    parts = {name: {key: one[numbers] for key, one in arrays.items()} for name, numbers in rows.items()}
    base, *tuned = (MAKERS[world]() for _ in range(3))
    for model, name in zip((base, *tuned), ("base", "tuned1", "tuned2"), strict=True):
        model.load_state_dict(type(model).from_pretrained(name).state_dict())
    start = {name: one.detach().clone() for name, one in base.eval().named_parameters()}
    deltas = [{name: one.detach() - start[name] for name, one in model.named_parameters()} for model in tuned]
    free = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=1e-2, weight_decay=0.1)

    def losses(batch: dict[str, Tensor]) -> Tensor:
        values = {name: one + sum(free[i].float() * deltas[i][name] for i in range(2)) for name, one in start.items()}
        return token_losses(world, torch.func.functional_call(base, values, (), batch).logits, batch)

    def validation() -> float:
        with torch.no_grad():
            return float(losses(parts["validation"]).mean())

    stream = shuffled(Examples(parts["train"], "data"), 16, 0, "train")
    trace, scores = [], [validation()]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for step in range(30):
        loss = losses(stream.next()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([free], 1.0)
        optimizer.step()
        schedule.step()
        trace.append(float(loss.detach()))
        if step % 10 == 9:
            scores.append(validation())
    found = report["trace"]
    assert [entry[2] for entry in found] == pytest.approx(scores, rel=1e-4)
    assert [entry[1] for entry in found[1:]] == pytest.approx(np.reshape(trace, (3, 10)).mean(1).tolist(), rel=1e-4)
    assert report["labels"] == ("next tokens" if world in NEXT else "tokens")


def test_a_learned_merge_is_no_worse_than_the_average(world: str) -> None:
    report = ofasd("data.npz", "out", "--objective", "cross-entropy", "--steps", "60")
    learned("run", "out/recipe.yaml", "-o", "merged")
    fresh = mixed(world, 200, 500)
    figures = {}
    for name in ("base", "merged", "average"):
        model = type(MAKERS[world]()).from_pretrained("base" if name == "average" else name).eval()
        if name == "average":
            tuned = [load_file(f"tuned{which}/model.safetensors") for which in (1, 2)]
            model.load_state_dict({key: (tuned[0][key] + tuned[1][key]) / 2 for key in tuned[0]}, strict=False)
            model.tie_weights()
        with torch.no_grad():
            logits, labels = counted_tokens(world, model(**fresh).logits, fresh)
        loss = float(functional.cross_entropy(logits, labels))
        figures[name] = loss, 100 * float((logits.argmax(-1) == labels).double().mean())
    (loss, accuracy), (average, reached) = figures["merged"], figures["average"]
    assert loss <= average + 1e-2 and accuracy >= reached > 100 / VOCABULARY
    assert report["test"]["learned"]["loss"] <= report["test"]["average"]["loss"] + 1e-3
    assert {"loss", "accuracy"} <= report["test"]["learned"].keys()


def test_a_teacher_of_many_classes_is_kept_in_part(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ofasd("data.npz", "whole")
    assert whole["teacher"]["kept"] == 1.0
    monkeypatch.setattr(ensemble, "MOST_BYTES", 1)  # a turn of all sources for each batch
    turns = ofasd("data.npz", "turns")
    assert turns["coefficients"] == whole["coefficients"]
    assert numbers(turns["teacher"]) == pytest.approx(numbers(whole["teacher"]))
    monkeypatch.setattr(ensemble, "MOST_CLASSES", 10)
    monkeypatch.setattr(ensemble, "KEPT_CLASSES", 10)
    part = ofasd("data.npz", "part")
    assert 0.4 < part["teacher"]["kept"] < 1.0
    assert part["teacher"]["agreement"] == whole["teacher"]["agreement"]
    assert part["test"]["learned"]["agreement"] == pytest.approx(whole["test"]["learned"]["agreement"], abs=10)
    assert 0 <= part["test"]["average"]["divergence"] <= whole["test"]["average"]["divergence"] + 1e-6


@pytest.mark.parametrize("data", ["long.npz"])
def test_tuning_follows_the_loss_of_the_model(world: str, data: str) -> None:
    learned("svd", "--base", "base", "--sources", "tuned1", "tuned2", "--as", "components", "-o", "pool")
    learned("tune", "pool", "--base", "base", "--data", data, "-o", "out", "--steps", "6", "--batch", "16")
    report = json.loads(Path("out/report.json").read_text())
    arrays = mixed(world, 60, 7)
    rows = split_rows(60, {"validation": 0.2, "test": 0.2}, 0, "data")["test"]
    batch = {name: one[rows] for name, one in arrays.items()}
    for name, folder in (("base", "base"), ("tuned", "out/model")):
        model = type(MAKERS[world]()).from_pretrained(folder).eval()
        with torch.no_grad():
            expected = float(token_losses(world, model(**batch).logits, batch).mean())
        assert report["scores"][name]["test"]["loss"] == pytest.approx(expected, rel=1e-4)
    best = min([report["scores"]["components"]["validation"], *(one["validation"] for one in report["trace"])],
               key=lambda one: one["loss"])  # fmt: skip
    assert report["scores"]["tuned"]["validation"] == pytest.approx(best, rel=1e-4)


@TWO
@pytest.mark.parametrize(("asked", "form"), [((), "--orthogonalise"), (("--no-orthogonalise",), "--no-orthogonalise")])
def test_pooling_and_tuning_are_one_command(
    world: str, asked: tuple[str, ...], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["svd", "--base", "base", "--sources", "tuned1", "tuned2", "--top-k", "6"]
    learned(*words, "--as", "components", form, "-o", "pool")
    learned("tune", "pool", "--base", "base", "--data", "data.npz", "-o", "apart", "--steps", "2", "--top", "4")
    learned(*words, *asked, "--tune", "data.npz", "--tune-steps", "2", "--tune-top", "4", "-o", "together")
    first, second = (load_file(f"{name}/model/model.safetensors") for name in ("apart", "together"))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    assert not list(Path().glob(".*pool*"))
    capsys.readouterr()
    assert main([*words, "--tune-top", "4"]) == 2
    assert "--tune-top goes with --tune" in capsys.readouterr().err
    assert main([*words, "--tune", "data.npz", "--as", "lora"]) == 2
    assert "--tune writes a tuned model, --as something else" in capsys.readouterr().err


def test_fisher_information_is_of_the_tokens_that_count(world: str) -> None:
    model = type(MAKERS[world]()).from_pretrained("tuned1").eval()
    arrays = mixed(world, 60, 7)
    learned("stats", "tuned1", "--data", "data.npz", "-o", "all.safetensors", "--labels", "given", "--what", "fisher")
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim == 2)
    total = torch.zeros_like(parameter)
    for row in range(60):
        one = {key: array[row : row + 1] for key, array in arrays.items()}
        (gradient,) = torch.autograd.grad(token_losses(world, model(**one).logits, one).sum(), [parameter])
        total += gradient.square()
    found = load_file("all.safetensors")
    key = next(key for key in found if key.removesuffix(".fisher").endswith(name))
    assert torch.allclose(found[key], total / 60, rtol=1e-3, atol=1e-6)


@TWO
def test_a_search_finds_the_model_that_predicts_best(world: str) -> None:
    Path("recipe.yaml").write_text(
        "models: {base: ./base, a: ./tuned1, b: ./tuned2}\n"
        "merge: {method: task_arithmetic, base: base, sources: {a: 0.5, b: 0.5}}\n"
    )
    save_arrays("one.npz", task(world, 40, 90, 1))
    learned("search", "recipe.yaml", "--over", "merge.sources.a=0,1", "--data", "one.npz", "-o", "found")
    report = json.loads(Path("found/report.json").read_text())
    trials = [json.loads(line) for line in Path("found/trials.jsonl").read_text().splitlines()]
    assert report["scores"]["best"]["validation"] == max(one["scores"]["score"] for one in trials if one.get("scores"))
    assert report["scores"]["best"]["validation"] < 0  # minus the loss
    best = type(MAKERS[world]()).from_pretrained("found/model").eval()
    arrays = task(world, 40, 90, 1)
    rows = split_rows(40, {"test": 0.5}, 0, "data")["test"]
    batch = {name: one[rows] for name, one in arrays.items()}
    with torch.no_grad():
        expected = -float(token_losses(world, best(**batch).logits, batch).mean())
    assert report["scores"]["best"]["test"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_step_in_parts_and_activations_computed_again_are_the_step(world: str) -> None:
    whole, parts, other = (
        ofasd("data.npz", name, "--steps", "6", *more.split())["coefficients"]
        for name, more in {
            "whole": "--batch 24",
            "parts": "--batch 6 --accumulate 4 --checkpoint-activations",
            "other": "--batch 6",
        }.items()
    )
    for name, values in whole.items():
        assert parts[name] == pytest.approx(values, abs=1e-5)
    assert any(other[name] != pytest.approx(values, abs=1e-4) for name, values in whole.items())


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_is_stored_in_bfloat16_is_computed_in_float32(
    world: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "tuned1", "tuned2"):
        half = MAKERS[world]().to(torch.bfloat16)
        half.load_state_dict(type(half).from_pretrained(name).state_dict())
        store(half, Path(name))
        store(half.float(), Path("wide", name))
    words = {
        "ofasd": "ofasd --base base --sources tuned1 tuned2 --stream --granularity layer --controls none",
        "tune": "tune pool --base base --top 2",
        "align": "align --source-base base --source-model tuned1 --base tuned2 --controls cheap",
        "fisher": "stats tuned1 --labels given -o fisher.safetensors",
    }
    found = []
    for folder in (Path(), Path("wide")):
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            learned(
                *[
                    "svd",
                    "--base",
                    "base",
                    "--sources",
                    "tuned1",
                    "tuned2",
                    "--top-k",
                    "4",
                    "--as",
                    "components",
                    "-o",
                    "pool",
                ]
            )
            data = str(Path("data.npz" if folder == Path() else "../data.npz"))
            for name, line in words.items():
                short = () if name == "fisher" else ("--steps", "4", "-o", name)
                learned(*line.split(), "--data", data, *short, "--batch", "8")
            reports = [json.loads(Path(name, "report.json").read_text()) for name in ("ofasd", "tune", "align")]
            found.append([numbers(report["trace"]) for report in reports] + [load_file("fisher.safetensors")])
    narrow, wide = found
    for one, other in zip(narrow[:3], wide[:3], strict=True):
        assert len(one) > 1 and one == pytest.approx(other, rel=1e-5)
    assert all(torch.allclose(one, wide[3][key], rtol=1e-4, atol=1e-7) for key, one in narrow[3].items())
    capsys.readouterr()
    for name, line in words.items():
        short = ["-o", "more.safetensors"] if name == "fisher" else ["-o", "more"]
        assert main([*line.split(), "--data", "data.npz", *short, "--memory", "300MB"]) == 4
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "bytes a parameter (weights " in said and "raise --memory" in said
        assert not Path("more").exists()
