"""What a command writes beside its result is refused before the work, where it cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import write_llamas

from mergekit_px.cli import main

TASK = ["--base", "base", "--sources", "a"]


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["linear", "--sources", "base", "a", "-o", "out", "--report"], "r.html"),
        (["svd", *TASK, "-o", "out", "--report"], "r.json"),
        (["svd", *TASK, "--as", "components", "-o", "out", "--report"], "r.json"),
        (["compare", "base", "a", "--picture"], "p.svg"),
        (["report", "a", "-o"], "r.html"),
        (["lock", "recipe.yaml", "-o"], "x.lock.json"),
    ],
)
def test_no_work_is_done_for_a_file_that_cannot_be_written(
    words: list[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llamas(tmp_path, "a", layers=1)
    Path("recipe.yaml").write_text("models: {a: a, b: base}\nmerge: {method: linear, sources: [a, b]}\n")
    Path("file").touch()
    Path(f"taken{Path(file).suffix}").mkdir()
    for place in (f"file/{file}", f"/proc/{file}", f"taken{Path(file).suffix}"):
        assert main([*words, place]) == 4, place
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and place in told.err
    if words[0] in ("linear", "svd", "compare"):
        assert main([*words, f"a/{file}"]) == 4
        assert "inputs stay as they are" in capsys.readouterr().err
    assert not Path("out").exists() and {path.name for path in Path("a").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("words", [["linear", "--sources", "base", "a"], ["adapter", "extract", "base", "a"]])
def test_a_folder_is_not_given_the_name_of_another_kind_of_file(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llamas(tmp_path, "a", layers=1)
    for name in ("z.gguf", "z.safetensor"):
        assert main([*words, "-o", name]) == 4
        assert "names another kind of file" in capsys.readouterr().err and not Path(name).exists()
    Path("z.pt").mkdir()
    assert main(["linear", "--sources", "base", "a", "-o", "z.pt"]) == 0
