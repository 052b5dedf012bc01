"""How mergekit names models: paths, revisions and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.mergekit.references import Reference, short_name, split_reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("org/name")),
        ("org/name@main", Reference("org/name@main")),
        ("org/name+org/lora", Reference("org/name", "org/lora")),
        ("org/name@v1+./lora@v2", Reference("org/name@v1", "./lora@v2")),
        (" ./x ", Reference("./x")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert split_reference(text, "m.yml:1:1") == expected


def test_a_folder_with_a_plus_in_its_name_is_not_split(tmp_path: Path) -> None:
    folder = tmp_path / "a+b@c"
    assert split_reference(str(folder), "x") == Reference(str(tmp_path / "a"), "b@c")
    folder.mkdir()
    assert split_reference(str(folder), "x") == Reference(str(folder))


@pytest.mark.parametrize("text", ["a+b+c", "+b", "a+", "", "  ", "a@b@c"])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError):
        split_reference(text, "m.yml:1:1")


def test_names_are_short_and_distinct() -> None:
    taken: list[str] = ["merge"]
    for reference in ("org/Model-1.5B@v1", "other/Model-1.5B", "./merge/", "C:\\models\\x", "../..", "org/a+b"):
        taken.append(short_name(Reference(reference), taken))
    assert taken[1:] == ["Model-1-5B", "Model-1-5B-2", "merge-2", "x", "model", "a-b"]
    assert short_name(Reference("org/a", "./l/"), []) == "a-l"
