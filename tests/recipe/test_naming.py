from __future__ import annotations

import pytest

from mergekit_px.recipe.naming import model_names


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("./math-ft", "math-ft"),
        ("./math-ft/", "math-ft"),
        ("/data/models/Code_1.5B", "Code_1.5B"),
        ("org/Code-FT", "Code-FT"),
        ("org/Code-FT@main", "Code-FT"),
        ("org/Code-FT@refs/pr/3", "Code-FT"),
        ("tau.safetensors", "tau"),
        ("runs/a/model.safetensors", "a"),
        ("./two words", "two-words"),
        ("..", "model"),
        ("C:\\models\\x", "x"),
    ],
)
def test_a_name_is_the_last_part(reference: str, name: str) -> None:
    assert model_names([reference]) == [name]


def test_names_are_unique() -> None:
    assert model_names(["a/x", "b/x", "x", "y"], taken=["y"]) == ["x", "x-2", "x-3", "y-2"]
