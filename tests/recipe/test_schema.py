"""The JSON Schema that editors use: it accepts what the loader accepts and underlines what is misspelt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from recipe_samples import METHODS, RECIPE

from mergekit_px.errors import RecipeError
from mergekit_px.located.yaml_text import parse_yaml
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.schema import recipe_schema

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")
    if "\npxmerge: 1\n" in path.read_text(encoding="utf-8")
)


def problems(text: str, schema: dict[str, Any] | None = None) -> list[str]:
    validator = Draft202012Validator(schema or recipe_schema(METHODS))
    return [problem.message for problem in validator.iter_errors(parse_yaml(text, "r").data())]


def test_the_schema_is_one() -> None:
    for schema in (recipe_schema(METHODS), recipe_schema(method_catalog())):
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert json.loads(json.dumps(schema)) == schema


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_follow_it(example: Path) -> None:
    assert problems(example.read_text(encoding="utf-8"), recipe_schema(method_catalog())) == []


def test_every_key_of_the_format_follows_it() -> None:
    assert problems(RECIPE) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pxmerge: 1", "pxmerge: 2"),
        ("steps: ", "stepz: "),
        ("  dtype:", "  dtpye:"),
        ("method: ties", "method: tise"),
        ("density: 0.5", "densty: 0.5"),
        ("density: 0.5", "density: 1.5"),
        ("density: 0.5", "density: [0.5, 2]"),
        ("density: 0.5", "density: {math: 2}"),
        ("density: 0.5", "scope: {math: model}"),
        ("density: 0.5", "scope: nowhere"),
        ("method: linear}", "method: linear, params: {density: 1}}"),
        ("{math: 0.6, code: 0.4}", "{math: x}"),
        ("{math: 0.6, code: 0.4}", "[]"),
        ("{math: 0.6, code: 0.4}", "[math, math]"),
        ("base: base\n", "base: base\n    like: mergkit\n"),
        ("{method: slerp,", "{like: peft, method: slerp,"),
        ("    sources: {math: 0.6, code: 0.4}", "   "),
        ("layers: 8-15", "layers: all"),
        ("layers: 8-15", "layers: -1"),
        ("take: math", "take: [math]"),
        ("private: true", "private: maybe"),
        ("repo: org/merged, ", ""),
        ("./math-ft", "3"),
        ("models:", "model:"),
        ("output:", "merge: {method: linear, sources: [base]}\noutput:"),
    ],
)
def test_what_the_loader_refuses_it_refuses(old: str, new: str) -> None:
    text = RECIPE.replace(old, new, 1)
    assert text != RECIPE
    assert problems(text)
    with pytest.raises(RecipeError):
        parse_recipe(text, methods=METHODS)


def test_parameters_have_help_and_defaults() -> None:
    definitions = recipe_schema(method_catalog())["$defs"]
    density = definitions["ties_params"]["properties"]["density"]
    assert density["description"].startswith("Share of each source's elements")
    assert "default" in density
    single, over_layers, by_source = density["anyOf"]
    assert (single["minimum"], single["maximum"]) == (0, 1)
    assert over_layers["items"] == single
    assert by_source["additionalProperties"] == {"anyOf": [single, over_layers]}


def test_every_field_has_a_help_text() -> None:
    for name, definition in recipe_schema(method_catalog())["$defs"].items():
        for field, schema in definition.get("properties", {}).items():
            assert schema.get("description") or schema.get("$ref"), f"{name}.{field}"
