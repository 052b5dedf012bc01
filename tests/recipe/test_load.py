"""Recipes from files, text and Python data; where their parts stand; what a wrong one is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe_samples import METHODS, RECIPE

from mergekit_px.errors import RecipeError
from mergekit_px.located.validate import Part, Wanted
from mergekit_px.recipe.load import load_recipe, parse_recipe, recipe_from_mapping
from mergekit_px.recipe.model import ModelInput, Output, Push, Recipe, Rule, Step

SMALL = "models: {a: ./a, b: ./b}\nmerge: {method: linear, sources: [a, b]}\n"


def error(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml", methods=METHODS)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_every_key_of_the_format() -> None:
    loaded = parse_recipe(RECIPE, name="recipe.yaml", methods=METHODS)
    assert loaded.recipe == Recipe(
        models={
            "base": ModelInput(model="meta-llama/Llama-3.2-1B@main"),
            "math": ModelInput(model="./math-ft"),
            "code": ModelInput(model="org/code-ft", adapter="./code-lora"),
        },
        steps={
            "mixed": Step(
                method="ties",
                base="base",
                sources={"math": 0.6, "code": 0.4},
                params={"density": 0.5},
                rules=[
                    Rule(match="*.mlp.*", layers="8-15", params={"density": 0.3}),
                    Rule(match="*norm*", method="linear"),
                    Rule(match="lm_head.*", take="math"),
                ],
            ),
            "final": Step(method="slerp", sources=["mixed", "base"], params={"t": [0.0, 0.5, 0.3]}),
        },
        output=Output.model_validate(
            {
                "from": "final",
                "path": "./merged",
                "dtype": "bfloat16",
                "shard_size": "5GB",
                "config_from": "base",
                "push": Push(repo="org/merged", private=True),
            }
        ),
    )
    assert loaded.source == RECIPE
    assert loaded.dialect == "pxmerge"
    assert loaded.differences == ()


def test_a_single_step_may_be_written_as_merge() -> None:
    loaded = parse_recipe(SMALL, name="r.yaml")
    assert loaded.recipe.steps == {"merge": Step(method="linear", sources=["a", "b"])}
    assert loaded.where("steps", "merge", "method") == "r.yaml:2:9"
    assert loaded.where("steps", "merge") == loaded.where("steps") == "r.yaml:2:1"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("steps", "mixed", "params", "density"), "11:14"),
        (("steps", "mixed", "params"), "11:5"),
        (("models", "code", "adapter"), "5:30"),
        (("models", "math", "model"), "4:9"),
        (("steps", "mixed", "rules", 1, "method"), "14:27"),
        (("steps", "mixed", "rules", 1), "14:9"),
        (("output", "from"), "18:3"),
        (("steps", "mixed", "rules", 2, "layers"), "15:9"),
        (("steps", "mixed", "like"), "7:3"),
        (("seed",), "1:1"),
        ((), "1:1"),
    ],
)
def test_places_of_parts_and_of_the_nearest_parent(path: tuple[str | int, ...], place: str) -> None:
    assert parse_recipe(RECIPE, name="r.yaml").where(*path) == f"r.yaml:{place}"


def test_a_file_knows_its_path(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    loaded = load_recipe(file, methods=METHODS)
    assert loaded.path == file
    assert loaded.where("seed") == f"{file}:1:1"
    assert loaded.recipe == parse_recipe(RECIPE).recipe


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(file).recipe == parse_recipe(RECIPE).recipe


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: there is no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="a folder is no recipe"):
        load_recipe(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# caf\xc3\xa9\nmodels: {a: ./caf\xe9}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(latin)
    assert str(caught.value) == f"{latin}:2:18: not UTF-8 text; save the file as UTF-8"
    with pytest.raises(RecipeError):
        load_recipe("\0")


def test_a_recipe_from_python_data(tmp_path: Path) -> None:
    data = {"models": {"a": tmp_path, "b": "./b"}, "merge": {"method": "linear", "sources": ("a", "b")}}
    loaded = recipe_from_mapping(data, METHODS)
    assert loaded.recipe.models["a"].model == str(tmp_path)
    assert loaded.where("steps", "merge", "method") == "recipe"
    assert parse_recipe(loaded.source).recipe == loaded.recipe
    changed = recipe_from_mapping(data, overrides=["merge.sources=[b]"])
    assert changed.recipe.steps["merge"].sources == ["b"]
    with pytest.raises(RecipeError, match=r"^command line: unknown key 'sed'; did you mean 'seed'\?$"):
        recipe_from_mapping({**data, "sed": 1}, METHODS, name="command line")


def test_environment_variables_stay_as_they_are() -> None:
    loaded = parse_recipe(SMALL.replace("./a", "'${HOME}/a'"))
    assert loaded.recipe.models["a"].model == "${HOME}/a"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: ties", "methd: ties", "8:5: unknown key 'methd' in 'steps.mixed'; did you mean 'method'?"),
        ("    method: ties\n", "", "7:3: 'steps.mixed.method' is missing"),
        ("  dtype:", "  dtpye:", "20:3: unknown key 'dtpye' in 'output'; did you mean 'dtype'?"),
        ("take: math", "takes: math", "15:30: unknown key 'takes' in 'steps.mixed.rules.2'; did you mean 'take'?"),
        ("private: true", "privat: true", "23:28: unknown key 'privat' in 'output.push'; did you mean 'private'?"),
        ("{model: org", "{modl: org", "5:10: unknown key 'modl' in 'models.code'; did you mean 'model'?"),
        ("steps:  ", "stepz:  ", "6:1: unknown key 'stepz'; did you mean 'steps'?"),
        ("  from: final", "  from_: final", "18:3: unknown key 'from_' in 'output'; did you mean 'from'?"),
        ("pxmerge: 1", "pxmerge: 2", "1:10: 'pxmerge' must be 1, the version of the recipe format that this release"),
        ("pxmerge: 1", "pxmerge: true", "1:10: 'pxmerge' must be 1"),
        ("./math-ft", "12", "4:9: 'models.math' must be a path or {model: path, adapter: path}, not 12; put it in"),
        ("./math-ft", "", "4:8: 'models.math' must be a path or {model: path, adapter: path}, not nothing"),
        ("./code-lora", "3", "5:39: 'models.code.adapter' must be a path or a name on the Hub, or a list of them, not"),
        ("private: true", "private: yes", "23:37: 'output.push.private' must be true or false, not 'yes'"),
        ("[mixed, base]", "7", "16:35: 'steps.final.sources' must be a list of names of models or steps, or a mapping"),
        ("[mixed, base]", "[mixed, 7]", "16:35: 'steps.final.sources' must be a list of names"),
        ("{density: 0.5}", "0.5", "11:13: 'steps.mixed.params' must be a mapping from parameters to values, not 0.5"),
        ('match: "*norm*"', "match: 3", "14:17: 'steps.mixed.rules.1.match' must be a glob on tensor names, or a list"),
        ("layers: 8-15", "layers: 1.5", "13:36: 'steps.mixed.rules.0.layers' must be layers: 7, '8-15'"),
        ("5GB", "[5]", "21:15: 'output.shard_size' must be a size such as 5GB, not [5]"),
        ("  path: ./merged", "  kind: vector", "19:9: 'output.kind' must be model or task_vector, not 'vector'"),
        ("base: base\n", "base: base\n    missing: skip\n", "'steps.mixed.missing' must be error, present or base"),
        ("pxmerge: 1", "pxmerge: 1\nseed: 1.5", "2:7: 'seed' must be a whole number from 0 to 9223372036854775807"),
        ("pxmerge: 1", "pxmerge: 1\nseed: '1'", "2:7: 'seed' must be a whole number"),
        ("pxmerge: 1", "pxmerge: 1\nseed: -1", "2:7: 'seed' must be a whole number"),
        ("pxmerge: 1", "pxmerge: 1\nmerge: {}", "2:1: a recipe has either merge or steps"),
    ],
)
def test_misspelt_keys_and_wrong_types(old: str, new: str, message: str) -> None:
    assert old in RECIPE
    assert message in error(RECIPE.replace(old, new, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("# only a comment", "r.yaml: the recipe is empty"),
        ("- a\n- b", "r.yaml:1:1: a recipe is a mapping with models and steps"),
        ("just text", "r.yaml:1:1: a recipe is a mapping"),
        ("pxmerge: 1\n", "r.yaml:1:1: 'models' is missing"),
        ("models: {a: x}\nsteps: [a]", "r.yaml:2:8: 'steps' must be a mapping from names to steps, not ['a']"),
        ("models: 3\nsteps: {}", "r.yaml:1:9: 'models' must be a mapping from names to models, not 3"),
        ("models: {a: x}\nsteps: {m: linear}", "r.yaml:2:12: 'steps.m' must be a step such as"),
        ("models: {a: x}\nmerge:", "r.yaml:2:7: 'steps.merge' must be a step such as"),
        (SMALL + "output: ./x", "r.yaml:3:9: 'output' must be a mapping that says what is written"),
        (SMALL + "output: {push: org/x}", "'output.push' must be a mapping with the repo to push to"),
        (SMALL.replace("[a, b]", "[a, b], rules: {match: x}"), "'steps.merge.rules' must be a list of rules"),
        (SMALL.replace("[a, b]", "[a, b], rules: [x]"), "'steps.merge.rules.0' must be a mapping, not 'x'"),
        (SMALL.replace("sources: [a, b]", "slices: [{}]"), "'steps.merge.slices.0.sources' is missing"),
        (
            SMALL.replace("sources: [a, b]", "slices: [{sources: []}]"),
            "'steps.merge.slices.0.sources' must be a list of one source or more",
        ),
        (
            SMALL.replace("sources: [a, b]", "slices: [{sources: [{model: a, layer: 3}]}]"),
            "unknown key 'layer' in 'steps.merge.slices.0.sources.0'; did you mean 'layers'?",
        ),
    ],
)
def test_recipes_of_the_wrong_shape(text: str, message: str) -> None:
    assert message in error(text)


def parts_of(part: type[Part]) -> Iterator[type[Part]]:
    for other in part.__subclasses__():
        yield other
        yield from parts_of(other)


def test_what_each_field_may_hold_is_told_for_every_field() -> None:
    for part in parts_of(Part):
        for name, info in part.model_fields.items():
            assert sum(isinstance(mark, Wanted) for mark in info.metadata) == 1, (part, name)


def test_loading_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from mergekit_px.recipe.load import parse_recipe; import mergekit_px.recipe.schema; "
        "parse_recipe('merge_method: linear\\nmodels: [{model: a, parameters: {weight: 1}}]'); "
        "print(sorted({'torch', 'numpy', 'huggingface_hub', 'mergekit_px.methods'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
