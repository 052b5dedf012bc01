from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mergekit_px.cli._extras import EXTRAS
from mergekit_px.methods import load_methods


def test_methods_lists_them_all(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    outcome = run("methods")
    assert outcome.code == 0
    first_words = {line.split()[0] for line in outcome.stdout.splitlines() if line.strip()}
    assert set(load_methods()) <= first_words
    for family in ("Averages and interpolations", "Singular values of task vectors", "Building blocks"):
        assert f"\n{family}\n" in outcome.stdout
    assert [entry["name"] for entry in run("methods", "--json").document()] == list(load_methods())


@pytest.mark.parametrize("name", list(load_methods()))
def test_methods_explains_each(run, name: str) -> None:
    outcome = run("methods", name.replace("_", "-"))
    assert outcome.code == 0
    for field in load_methods()[name].params.model_fields:
        assert field in outcome.stdout
    assert "Raises:" not in outcome.stdout
    assert "``" not in outcome.stdout


def test_methods_suggests_the_nearest(run) -> None:
    outcome = run("methods", "tise")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "did you mean 'ties'" in outcome.stderr


def test_doctor_measures_and_keeps_the_token_secret(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mergekit_px.execute import bandwidth

    monkeypatch.setattr(bandwidth, "measure", lambda place: bandwidth.Bandwidth(2e10, 3e9, 1e9, cold=5e8))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@localhost:1/x")
    outcome = run("doctor", "-o", tmp_path)
    assert outcome.code == 0
    for words in (
        "20 GB/s",
        "from cache",
        "3 GB/s",
        "from disk",
        "500 MB/s",
        "cores",
        "torch",
        "present",
        "http://localhost:1/x",
    ):
        assert words in outcome.stdout
    document = run("doctor", "-o", tmp_path, "--json").document()
    assert document["bandwidth"] == {"memory": 2e10, "read": 3e9, "write": 1e9, "cold": 5e8}
    assert document["hub"]["token"] is True
    assert document["extras"].keys() == EXTRAS.keys()
    for secret in ("secret", "password"):
        assert secret not in outcome.stdout + outcome.stderr + str(document)


def test_doctor_on_a_disk_that_cannot_be_written(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_px.execute import bandwidth

    def refuse(place: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bandwidth, "measure", refuse)
    outcome = run("doctor")
    assert outcome.code == 0
    assert "not measured" in outcome.stdout


def test_demo_runs_through_this_command_line(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mergekit_px.demo

    def fake(output: Path, seed: int, merge: Callable[[Sequence[str]], int], say: Callable[[str], None]) -> None:
        assert merge(["inspect", "./nowhere"]) == 3
        say(f"{output} {seed}")

    monkeypatch.setattr(mergekit_px.demo, "run_demo", fake)
    outcome = run("demo", "-o", tmp_path, "--seed", 7)
    assert (outcome.code, outcome.stdout) == (0, f"{tmp_path} 7\n")


def test_the_extras_are_those_that_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"test", "docs", "dev"}


def test_a_missing_extra_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit_px.demo

    def fake(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setattr(mergekit_px.demo, "run_demo", fake)
    outcome = run("demo")
    assert outcome.code == 2
    assert outcome.stderr == "error: this needs the package sklearn; pip install 'pxmerge[demo]'\n"
