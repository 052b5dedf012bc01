"""The demo on the real command line with a training cut short, and everything around it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergekit_px.cli import main
from mergekit_px.demo import run_demo
from mergekit_px.demo.report import Results, Score, read_data
from mergekit_px.demo.tasks import TASKS
from mergekit_px.errors import OutputError, RunError, UsageError
from mergekit_px.methods import load_methods

SOME = {"linear", "slerp", "svd", "ties"}


@pytest.fixture(scope="module")
def shortened() -> Iterator[None]:
    """A demo of little training and few methods; every method runs by its recipe on docs/methods.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_px.demo.LAST", 2)
        patch.setattr("mergekit_px.demo.tasks.TEST_IMAGES", 100)
        patch.setattr("mergekit_px.demo.train.SHARED_IMAGES", 1400)
        patch.setattr("mergekit_px.demo.train.RUN_STEPS", 60)
        patch.setattr("mergekit_px.demo.train.SAVED_EVERY", 20)
        patch.setattr("mergekit_px.demo.train.FINE_TUNE_EPOCHS", 1)
        patch.setattr("mergekit_px.demo.LEFT_OUT", load_methods().keys() - SOME)
        yield


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(shortened: None, said: list[str], folder: Path) -> Results:
    return run_demo(folder, 0, main, said.append)


def test_base_then_fine_tunes_then_merges_the_best_first(result: Results) -> None:
    kinds = [score.kind for score in result.scores]
    assert kinds[: 1 + len(TASKS)] == ["base", *["fine-tune"] * len(TASKS)]
    assert kinds[1 + len(TASKS) :] == ["merge"] * len(SOME)
    reached = [score.normalised for score in result.scores if score.kind == "merge"]
    assert reached == sorted(reached, reverse=True)


def test_training_teaches(result: Results) -> None:
    base, *others = result.scores
    for score, task in zip(others, TASKS, strict=False):
        assert score.accuracy[task] == result.own[task]
    assert sum(result.own.values()) > sum(base.accuracy.values())


def test_the_classifier_is_the_same_in_all(result: Results, folder: Path) -> None:
    base, *fine_tunes = (load_file(folder / name / "model.safetensors") for name in ("base", *TASKS))
    for model in fine_tunes:
        frozen = {name for name in base if np.array_equal(base[name], model[name])}
        assert frozen == {"classifier.weight", "classifier.bias"}


def test_scores_are_normalised_by_the_fine_tunes(result: Results) -> None:
    for score in result.scores:
        assert score.normalised == pytest.approx(
            np.mean([100 * score.accuracy[task] / result.own[task] for task in TASKS]), abs=0.06
        )
    answers = {"one": np.array([True, True, False, False]), "two": np.array([True, False, True, False])}
    score = Score.of(answers, {"one": 50.0, "two": 100.0}, "x", "merge")
    assert score.accuracy == {"one": 50.0, "two": 50.0} and score.normalised == 75.0
    assert score.error == pytest.approx(np.std([150, 100, 50, 0], ddof=1) / 2, abs=0.06)


def test_the_base_is_the_mean_of_the_last_checkpoints(result: Results, folder: Path) -> None:
    assert [row.step for row in result.averages] == [20, 40, 60]
    assert [row.average is None for row in result.averages] == [True, False, False]
    runs = [load_file(folder / "run" / f"step-{step}" / "model.safetensors") for step in (40, 60)]
    for name, tensor in load_file(folder / "base" / "model.safetensors").items():
        assert abs(tensor - sum(run[name].astype("float64") for run in runs) / 2).max() < 1e-6
    assert result.averages[-1].average == pytest.approx(result.scores[0].mean)


def test_results_are_shown_and_saved(result: Results, said: list[str], folder: Path) -> None:
    table = (folder / "accuracy.md").read_text()
    assert table in said
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["", *TASKS, "normalised", "±"]
    assert len(rows) == 2 + len(result.scores)
    for score, (label, *cells) in zip(result.scores, rows[2:], strict=True):
        assert label.strip() == score.label
        assert [float(cell) for cell in cells] == [*score.accuracy.values(), score.normalised, score.error]
    assert read_data(folder / "accuracy.json") == result


@pytest.mark.parametrize("name", ["accuracy.png", "averages.png"])
def test_the_pictures_are_some(result: Results, folder: Path, name: str) -> None:
    from matplotlib.image import imread

    picture = imread(folder / name)
    height, width, _ = picture.shape
    assert width > 800 and height > 400
    assert picture[..., :3].min() < 0.5 and picture.std() > 0.02


def test_merges_are_what_the_command_line_wrote(result: Results, folder: Path) -> None:
    models = [load_file(folder / name / "model.safetensors") for name in TASKS]
    merged = load_file(folder / "merged" / "linear" / "model.safetensors")
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        mean = sum(model[name].astype("float64") for model in models) / len(models)
        assert abs(tensor - mean).max() < 1e-6
    assert (folder / "merged" / "linear" / "pxmerge.lock.json").is_file()


def test_a_second_run_replaces_the_first_with_the_same(
    result: Results, folder: Path, shortened: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [folder / "base", folder / "merged" / "linear"]
    before = [(path / "model.safetensors").read_bytes() for path in kept]
    monkeypatch.setattr("mergekit_px.demo.LEFT_OUT", load_methods().keys() - {"linear"})
    again = run_demo(folder, 0, main, lambda line: None)
    assert [(path / "model.safetensors").read_bytes() for path in kept] == before
    first = {score.label: score for score in result.scores}
    assert all(score == first[score.label] for score in again.scores)
    assert [score.kind for score in again.scores].count("merge") == 1


def test_a_failed_merge_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_px.demo.train.RUN_STEPS", 6)
    monkeypatch.setattr("mergekit_px.demo.train.SAVED_EVERY", 1)
    monkeypatch.setattr("mergekit_px.demo.train.FINE_TUNE_EPOCHS", 1)

    def refuse(arguments: Sequence[str]) -> int:
        return 4

    with pytest.raises(RunError, match="ended with exit code 4"):
        run_demo(tmp_path, 0, refuse, lambda line: None)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(UsageError) as caught:
        run_demo(tmp_path / "demo", 0, main, lambda line: None)
    assert str(caught.value) == 'the demo needs scikit-learn; run: pip install "pxmerge[demo]"'
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="thesis"):
        run_demo(tmp_path, 0, main, lambda line: None)
    with pytest.raises(OutputError, match="not a folder"):
        run_demo(tmp_path / "thesis.tex", 0, main, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_merge_is_scored_beside_base_and_fine_tunes(
    result: Results, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = [score for score in result.scores if score.label == "ties"]
    assert main(["demo", "-o", str(folder), "--score", str(folder / "merged" / "ties")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    cells = [float(cell) for cell in last.strip("|").split("|")[1:]]
    assert cells == [*row.accuracy.values(), row.normalised, row.error]
    assert main(["demo", "-o", str(folder / "none"), "--score", str(folder / "base")]) == 3
    assert main(["demo", "-o", str(folder), "--score", str(folder / "none")]) == 3
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
