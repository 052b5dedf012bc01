"""Whatever is given to the loader, it gives a recipe or a one-line RecipeError."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_samples import METHODS, RECIPE

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.dump import convert_text
from mergekit_px.recipe.load import load_recipe, parse_recipe, recipe_from_mapping
from mergekit_px.recipe.loaded import LoadedRecipe

PEER = (Path(__file__).parents[2] / "recipes" / "mergekit-slerp.yml").read_text(encoding="utf-8")

WORDS = [
    *(
        "models",
        "steps",
        "merge",
        "output",
        "method",
        "sources",
        "base",
        "params",
        "rules",
        "slices",
        "layers",
        "match",
    ),
    *("take", "drop", "weights", "weight", "like", "from", "push", "repo", "path", "dtype", "seed", "pxmerge", "model"),
    *("merge_method", "base_model", "parameters", "layer_range", "filter", "value", "density", "t", "tokenizer_source"),
    *("adapter", "ties", "linear", "slerp", "passthrough", "dare_ties", "a", "b", "base", "union", "float16", "0-3"),
]


def check(load: Any) -> None:
    try:
        loaded = load()
    except RecipeError as error:
        assert "\n" not in str(error) and str(error)
        assert error.where
    else:
        assert isinstance(loaded, LoadedRecipe)
        assert parse_recipe(convert_text(loaded)).recipe == loaded.recipe
        loaded.where("steps", 0, "x")


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    check(lambda: parse_recipe(text, methods=METHODS))


@given(st.text(st.sampled_from(list("ab:-[]{}&*!|>'\"%@`#,? \n\t0.~<")), max_size=60))
def test_text_of_yaml_signs(text: str) -> None:
    check(lambda: parse_recipe(text, methods=METHODS))


@given(st.binary(max_size=100))
@settings(max_examples=50)
def test_any_bytes(tmp_path_factory: Any, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(data)
    check(lambda: load_recipe(file, methods=METHODS))


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([RECIPE, PEER]))
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(text)))
        last = min(len(text), first + draw(st.integers(0, 12)))
        other = draw(st.integers(0, len(text)))
        piece = draw(
            st.sampled_from(["", " ", "\n", ":", "{", "}", "[", "]", "*", "-1", "null", "1e400", "x", *WORDS])
            | st.just(text[other : other + 20])
        )
        text = text[:first] + piece + text[last:]
    return text


@given(mutated())
@settings(max_examples=300)
def test_mutated_recipes(text: str) -> None:
    check(lambda: parse_recipe(text, methods=METHODS))


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=3)
DATA = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(WORDS), DATA, max_size=5))
@settings(max_examples=300)
def test_any_data(data: dict[str, Any]) -> None:
    check(lambda: recipe_from_mapping(data, METHODS))


@given(st.lists(st.tuples(st.sampled_from(WORDS), DATA), min_size=1, max_size=3), st.sampled_from([RECIPE, PEER]))
@settings(max_examples=200)
def test_parts_of_recipes_replaced_by_any_data(parts: list[tuple[str, Any]], text: str) -> None:
    data = parse_yaml_data(text)
    for key, value in parts:
        replace_key(data, key, value)
    check(lambda: recipe_from_mapping(data, METHODS))


def parse_yaml_data(text: str) -> Any:
    from mergekit_px.located.yaml_text import parse_yaml

    return parse_yaml(text, "r").data()


def replace_key(data: Any, key: str, value: Any) -> None:
    if isinstance(data, dict):
        for name in data:
            if name == key:
                data[name] = value
            else:
                replace_key(data[name], key, value)
    elif isinstance(data, list):
        for item in data:
            replace_key(item, key, value)


@given(st.text(max_size=40) | st.builds(lambda a, b, c: f"{a}.{b}={c}", *[st.sampled_from(WORDS)] * 3))
@settings(max_examples=200)
def test_any_override(override: str) -> None:
    for text in (RECIPE, PEER):
        with contextlib.suppress(RecipeError):
            parse_recipe(text, overrides=[override], methods=METHODS)
