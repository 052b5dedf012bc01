"""Commands by one call: what the command line does and prints, and errors that are raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import write_llamas

import mergekit_px as px
from mergekit_px.cli import main
from mergekit_px.errors import InputError, UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_llamas(tmp_path, "a", "b")
    return tmp_path


def test_values_become_the_words_of_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = px.run_command(
        "svd", sources=["a", folder / "b"], base="base", top_k="50%", orthogonalise=False, resume=False, output="called"
    )
    assert document["output"] == "called"
    line = "svd --sources a b --base base --top-k 50% --no-orthogonalise -o typed"
    assert main([*line.split(), "-q"]) == 0
    assert Path("called/model.safetensors").read_bytes() == Path("typed/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["adapter", "extract", "base", "a", "-o", "typed-lora", "--rank", "4", "--json"]) == 0
    typed = json.loads(capsys.readouterr().out)
    called = px.run_command("adapter extract", "base", "a", output="called-lora", rank=4)
    assert called == {**typed, "output": "called-lora"}
    assert capsys.readouterr().out == ""


def test_assignments_and_names_that_are_words_of_python() -> None:
    recipe = "pxmerge: 1\nmodels: {a: a, b: b}\nmerge: {method: linear, sources: [a, b]}\n"
    Path("recipe.yaml").write_text(recipe)
    document = px.run_command("plan", "recipe.yaml", set={"merge.method": "slerp", "merge.params.t": 0.25})
    assert document["steps"]["merge"]["method"] == "slerp"
    assert px.run_command("svd", sources=["a", "b"], base="base", as_="components", output="pool")["as"] == "components"


def test_a_command_without_a_document_gives_its_text() -> None:
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    Path("mergekit.yml").write_text(f"{models}merge_method: linear\ndtype: float32\n")
    assert "method: linear" in px.run_command("convert", "mergekit.yml")
    assert px.run_command("verify", px.run_command("linear", sources=["a", "b"])["output"])["intact"] is True


@pytest.mark.parametrize(
    ("command", "options", "kind", "said"),
    [
        ("merge", {}, UsageError, "there is no command 'merge'"),
        ("adapter", {}, UsageError, "there is no command 'adapter'"),
        ("ties", {"sauces": ["a"]}, UsageError, "No such option: --sauces"),
        ("ties", {"overwite": False}, UsageError, "No such option: --overwite"),
        ("ties", {"sauces": None}, UsageError, "No such option: --sauces"),
        (["ties"], {}, UsageError, "a command is its name"),
        ("ties", {"sources": [object()]}, UsageError, "--sources is object"),
        ("ties", {"sources": ["a", "none"], "base": "base"}, InputError, "none"),
        ("ties", {"sources": ["a", "b"], "base": "base", "density": 3}, UsageError, "--density must be from 0 to 1"),
    ],
)
def test_errors_are_raised(command: str, options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        px.run_command(command, **options)
