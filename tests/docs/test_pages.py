"""Recipes on the documentation's pages run, and the pieces that pages are made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mergekit_px.cli import main
from mergekit_px.recipe.load import recipe_from_mapping
from tools.docs import __main__ as command
from tools.docs.fields import value_text
from tools.docs.markdown import docstring, fill, signature, table

ROOT = Path(__file__).parents[2]
RECIPES = [
    pytest.param(text, id=f"{page}-{number}")
    for page in ("methods.md", "recipe.md")
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_on_the_pages_run(
    text: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code = main(["run", str(recipe), "--output", str(tmp_path / "out"), "--quiet"])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "inputs.md").read_text(), re.DOTALL))
def test_recipes_about_inputs_can_be_read(text: str) -> None:
    assert recipe_from_mapping(yaml.safe_load(text)).recipe.models


def test_drift_is_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    monkeypatch.setattr(command.mergekit_px, "__file__", str(tmp_path / "mergekit_px" / "__init__.py"))
    monkeypatch.setattr(command, "generated_pages", lambda root: {root / "docs" / "page.md": "new\n"})
    assert command.main(["--check"]) == 1 and not page.exists()
    assert command.main([]) == 0 and page.read_text() == "new\n"
    assert command.main(["--check"]) == 0
    page.write_text("edited\n")
    assert command.main(["--check"]) == 1 and page.read_text() == "edited\n"


def test_outside_of_a_checkout_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.mergekit_px, "__file__", str(tmp_path / "mergekit_px" / "__init__.py"))
    assert command.main([]) == 2 and not list(tmp_path.iterdir())


def test_fill_replaces_what_is_marked_and_nothing_else() -> None:
    page = "before\n<!-- generated: keys of A -->\nold\n<!-- end -->\nafter\n"
    filled = fill(page, {"keys of A": "new\n"})
    assert filled == "before\n<!-- generated: keys of A -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert fill(filled, {"keys of A": "new\n"}) == filled
    with pytest.raises(ValueError, match="marks"):
        fill(page, {"keys of B": ""})
    with pytest.raises(ValueError, match="marks"):
        fill("no marks", {"keys of A": ""})


def test_docstrings_become_markdown() -> None:
    text = docstring("One ``line``.\n\nArgs:\n    a: the :class:`~x.A`.\n    b: two\n        lines.\n\nEnd.")
    assert text == "One `line`.\n\nArgs:\n\n- `a`: the `x.A`.\n- `b`: two lines.\n\nEnd."


def test_signatures() -> None:
    def call(first: int, *rest: str, last: list[int], **others: float) -> None:
        pass

    assert signature("call", call) == "call(first: int, *rest: str, last: list[int], **others: float) -> None"


def test_tables_keep_their_columns() -> None:
    assert table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"


def test_values_in_words() -> None:
    definitions = {"Part": {"properties": {}}, "Mode": {"enum": ["a", "b"]}}
    for schema, words in [
        ({"type": "number", "minimum": 0, "maximum": 1}, "number from 0 to 1"),
        ({"type": "integer", "exclusiveMinimum": 0}, "integer above 0"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"type": "array", "items": {"$ref": "#/$defs/Part"}}, "list of [Part](#part)"),
        ({"$ref": "#/$defs/Mode"}, "`a`, `b`"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "mapping to number"),
    ]:
        assert value_text(schema, definitions) == words
