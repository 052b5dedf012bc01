"""The demo on the real command line with a training cut short, and everything around it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mergekit_px.cli import main
from mergekit_px.demo import DemoResult, run_demo
from mergekit_px.demo.tasks import FINE_TUNES
from mergekit_px.errors import OutputError, RunError, UsageError
from mergekit_px.methods import load_methods

SOME = {"linear", "slerp", "svd", "ties"}


@pytest.fixture(scope="module")
def shortened() -> Iterator[None]:
    """A demo of little training and few methods; every method runs by its recipe on docs/methods.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_px.demo.train.BASE_EPOCHS", 3)
        patch.setattr("mergekit_px.demo.train.FINE_TUNE_EPOCHS", 2)
        patch.setattr("mergekit_px.demo.LEFT_OUT", load_methods().keys() - SOME)
        yield


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(shortened: None, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"), 0, main, said.append)


def test_base_then_fine_tunes_then_merges_the_best_first(result: DemoResult) -> None:
    kinds = [score.kind for score in result.scores]
    assert kinds[: 1 + len(FINE_TUNES)] == ["base", *["fine-tune"] * len(FINE_TUNES)]
    assert kinds[1 + len(FINE_TUNES) :] == ["merge"] * len(SOME)
    means = [score.mean for score in result.scores if score.kind == "merge"]
    assert means == sorted(means, reverse=True)


def test_training_teaches(result: DemoResult) -> None:
    base, *others = result.scores
    assert base.accuracy["plain"] > 30  # Guessing gives 10.
    for score, task in zip(others, FINE_TUNES, strict=False):
        assert score.accuracy[task] > base.accuracy[task]


def test_results_are_shown_and_saved(result: DemoResult, said: list[str]) -> None:
    table = result.table.read_text()
    assert table in said
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["", "plain", *FINE_TUNES, "mean"]
    assert len(rows) == 2 + len(result.scores)
    for score, (label, *cells) in zip(result.scores, rows[2:], strict=True):
        values = [float(cell) for cell in cells]
        assert label.strip() == score.label
        assert values[:-1] == list(score.accuracy.values())
        assert values[-1] == pytest.approx(sum(values[:-1]) / 4, abs=0.051)
    data = json.loads(result.data.read_text())
    assert data["seed"] == 0
    assert [row["accuracy"] for row in data["scores"]] == [score.accuracy for score in result.scores]


def test_the_picture_is_one(result: DemoResult) -> None:
    from matplotlib.image import imread

    picture = imread(result.picture)
    height, width, _ = picture.shape
    assert width > 800 and height > 400
    assert picture[..., :3].min() < 0.5 and picture.std() > 0.02


def test_merges_are_what_the_command_line_wrote(result: DemoResult) -> None:
    folder = result.table.parent
    models = [load_file(folder / name / "model.safetensors") for name in FINE_TUNES]
    merged = load_file(folder / "merged" / "linear" / "model.safetensors")
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        mean = sum(model[name].astype("float64") for model in models) / len(models)
        assert abs(tensor - mean).max() < 1e-6
    assert (folder / "merged" / "linear" / "pxmerge.lock.json").is_file()


def test_a_second_run_replaces_the_first_with_the_same(
    result: DemoResult, shortened: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = result.table.parent
    kept = [folder / "base", folder / "merged" / "linear"]
    before = [(path / "model.safetensors").read_bytes() for path in kept]
    monkeypatch.setattr("mergekit_px.demo.LEFT_OUT", load_methods().keys() - {"linear"})
    again = run_demo(folder, 0, main, lambda line: None)
    assert [(path / "model.safetensors").read_bytes() for path in kept] == before
    first = {score.label: score for score in result.scores}
    assert all(score == first[score.label] for score in again.scores)
    assert [score.kind for score in again.scores].count("merge") == 1


def test_a_failed_merge_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_px.demo.train.BASE_EPOCHS", 1)
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


def test_a_merge_is_scored_beside_base_and_fine_tunes(result: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    demo = result.data.parent
    (row,) = [score for score in result.scores if score.label == "ties"]
    assert main(["demo", "-o", str(demo), "--score", str(demo / "merged" / "ties")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert [float(cell) for cell in last.strip("|").split("|")[1:-1]] == list(row.accuracy.values())
    assert main(["demo", "-o", str(demo / "none"), "--score", str(demo / "base")]) == 3
    assert main(["demo", "-o", str(demo), "--score", str(demo / "none")]) == 3
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
