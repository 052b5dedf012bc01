"""``--set key=value``."""

from __future__ import annotations

import pytest
from recipe_samples import METHODS, RECIPE

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe


def load(*overrides: str, text: str = RECIPE) -> LoadedRecipe:
    return parse_recipe(text, name="r.yaml", overrides=overrides, methods=METHODS)


def test_values_of_every_kind() -> None:
    loaded = load(
        "steps.mixed.params.density=0.3",
        "output.dtype=float32",
        "models.math=./x=y",
        "steps.mixed.rules.0.layers=[1, 2]",
        "steps.mixed.sources.code=[0.1, 0.9]",
        "output.push.private=false",
        "output.config_from=",
        "seed=7",
        "steps.final.sources.1=math",
    )
    recipe = loaded.recipe
    assert recipe.steps["mixed"].params == {"density": 0.3}
    assert recipe.output.dtype == "float32"
    assert recipe.models["math"].model == "./x=y"
    assert recipe.steps["mixed"].rules[0].layers == [1, 2]
    assert recipe.steps["mixed"].sources == {"math": 0.6, "code": [0.1, 0.9]}
    assert recipe.output.push is not None and recipe.output.push.private is False
    assert recipe.output.config_from is None
    assert recipe.seed == 7
    assert recipe.steps["final"].sources == ["mixed", "math"]


def test_fields_that_the_text_does_not_have() -> None:
    text = "models: {a: ./a}\nmerge: {method: ties, sources: [a]}\n"
    recipe = load("output.push.repo=org/x", "merge.params.density=0.1", "models.a.adapter=./l", text=text).recipe
    assert recipe.output.push is not None and recipe.output.push.repo == "org/x"
    assert recipe.steps["merge"].params == {"density": 0.1}
    assert (recipe.models["a"].model, recipe.models["a"].adapter) == ("./a", "./l")


def test_the_single_step_goes_by_both_of_its_paths() -> None:
    text = "models: {a: ./a}\nmerge: {method: ties, sources: [a]}\n"
    assert load("steps.merge.base=a", text=text).recipe == load("merge.base=a", text=text).recipe


def test_the_weight_of_a_source_that_stands_in_a_list() -> None:
    text = "models: {a: ./a, b: ./b}\nmerge: {method: ties, sources: [a, b]}\n"
    recipe = load("merge.sources.b=0.3", text=text).recipe
    assert recipe.steps["merge"].sources == {"a": None, "b": 0.3}
    with pytest.raises(RecipeError, match=r"merge.sources has no 'c'"):
        load("merge.sources.c=0.3", text=text)


def test_names_with_dots() -> None:
    text = "models: {llama-3.2: ./a, llama-3: ./b}\nmerge: {method: linear, sources: {llama-3.2: 1}}\n"
    recipe = load("models.llama-3.2.adapter=./x", "merge.sources.llama-3.2=0.5", text=text).recipe
    assert recipe.models["llama-3.2"].adapter == "./x"
    assert recipe.steps["merge"].sources == {"llama-3.2": 0.5}


def test_later_overrides_win_and_the_order_of_keys_stays() -> None:
    recipe = load("steps.mixed.params.density=0.3", "steps.mixed.params.density=0.4").recipe
    assert recipe.steps["mixed"].params == {"density": 0.4}
    assert list(recipe.steps) == ["mixed", "final"]
    assert list(load("models.base=./x").recipe.models) == ["base", "math", "code"]


def test_the_source_is_the_changed_recipe() -> None:
    loaded = load("steps.mixed.params.density=0.3", "output.dtype=float32")
    assert loaded.source.startswith(
        "# --set steps.mixed.params.density=0.3\n# --set output.dtype=float32\npxmerge: 1\n"
    )
    assert parse_recipe(loaded.source).recipe == loaded.recipe


def test_places_of_overrides() -> None:
    loaded = load("steps.mixed.params.density=0.3")
    assert loaded.where("steps", "mixed", "params", "density") == "--set steps.mixed.params.density=0.3"
    assert loaded.where("steps", "mixed", "rules", 0) == "r.yaml:13:9"


def test_aliased_parts_change_only_where_they_are_named() -> None:
    text = "models: {a: ./a}\nsteps:\n  x: &s {method: ties, sources: [a], params: &p {density: 0.5}}\n  y: *s\n"
    recipe = load("steps.x.params.density=0.1", text=text).recipe
    assert recipe.steps["x"].params == {"density": 0.1}
    assert recipe.steps["y"].params == {"density": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "not key=value; write for example --set output.dtype=float32"),
        ("=3", "not key=value"),
        ("steps..mixed=3", "not key=value"),
        ("steps.mixd.params.density=0.3", "steps has no 'mixd'; did you mean 'mixed'?"),
        ("models.mth=./x", "models has no 'mth'; did you mean 'math'?"),
        ("steps.mixed.sources.cod=1", "steps.mixed.sources has no 'cod'; did you mean 'code'?"),
        ("step.mixed.params.density=0.3", "unknown key 'step'; did you mean 'steps'?"),
        ("output.dtyp=float32", "unknown key 'dtyp' in 'output'; did you mean 'dtype'?"),
        ("steps.mixed.params.densty=1", "unknown ties parameter 'densty' in 'steps.mixed.params'; did you mean 'den"),
        ("steps.mixed.params.density=2", "'density' of ties: must be from 0 to 1, not 2"),
        ("output.dtype=float3", "merged tensors cannot be stored as 'float3'; did you mean 'float32'?"),
        ("steps.mixed.rules.7.layers=3", "steps.mixed.rules is a list with entries 0 to 2, not '7'"),
        ("steps.mixed.rules.-1.layers=3", "steps.mixed.rules is a list with entries 0 to 2, not '-1'"),
        ("steps.mixed.rules.x=3", "steps.mixed.rules is a list with entries 0 to 2, not 'x'"),
        ("steps.mixed.params.density.math=1", "steps.mixed.params.density is a single value and has no 'math'"),
        ("steps.mixed.params.density=[0.1, 0.2", "not YAML: expected ',' or ']'"),
        ("steps.mixed.params.density=!!python/name:x", "not allowed"),
        ("steps.mixed=", "'steps.mixed' must be a step such as"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(override)
    assert caught.value.where == f"--set {override}"
    assert message in str(caught.value)


PEER = """\
merge_method: slerp
base_model: ./a
models: [{model: ./b}]
parameters: {t: 0.5}
"""


def test_a_mergekit_config_is_changed_before_it_is_translated() -> None:
    loaded = load("parameters.t=0.2", "models.0.model=./c", "dtype=float32", text=PEER)
    assert loaded.recipe.steps["merge"].params == {"t": 0.2}
    assert [entry.model for entry in loaded.recipe.models.values()] == ["./a", "./c"]
    assert loaded.recipe.output.dtype == "float32"
    with pytest.raises(RecipeError, match=r"--set parameters\.tt=1: unknown key 'tt' in 'parameters'"):
        load("parameters.tt=1", text=PEER)


def test_output_and_seed_of_a_mergekit_config_can_be_set() -> None:
    loaded = load("output.path=./x", "output.dtype=float16", "seed=3", text=PEER)
    assert (loaded.recipe.output.path, loaded.recipe.output.dtype, loaded.recipe.seed) == ("./x", "float16", 3)
    assert loaded.where("steps", "merge", "params", "t") == "r.yaml:4:17"
    with pytest.raises(RecipeError, match=r"--set output\.pth=x: unknown key 'pth' in 'output'; did you mean 'path'"):
        load("output.pth=x", text=PEER)
