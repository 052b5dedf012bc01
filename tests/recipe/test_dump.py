"""Recipes as tidy YAML that reads back as the same recipe."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_samples import RECIPE

from mergekit_px.recipe.dump import convert_text, dump_recipe
from mergekit_px.recipe.load import parse_recipe, recipe_from_mapping

TIDY = """\
pxmerge: 1
models:
  base: meta-llama/Llama-3.2-1B@main
  math: ./math-ft
  code: {model: org/code-ft, adapter: ./code-lora}
steps:
  mixed:
    method: ties
    base: base
    sources: {math: 0.6, code: 0.4}
    params: {density: 0.5}
    rules:
      - {match: "*.mlp.*", layers: 8-15, params: {density: 0.3}}
      - {match: "*norm*", method: linear}
      - {match: "lm_head.*", take: math}
  final:
    method: slerp
    sources: [mixed, base]
    params: {t: [0.0, 0.5, 0.3]}
output:
  from: final
  dtype: bfloat16
  config_from: base
  push: {repo: org/merged, private: true}
"""


def test_the_usual_order_without_defaults() -> None:
    assert dump_recipe(parse_recipe(RECIPE).recipe) == TIDY


def test_a_single_step_named_merge_is_written_short() -> None:
    text = "pxmerge: 1\nmodels:\n  a: ./a\nmerge:\n  method: linear\n  sources: [a]\n"
    assert dump_recipe(parse_recipe(text).recipe) == text


def test_long_things_go_on_lines_of_their_own() -> None:
    names = [f"a_model_with_quite_a_long_name_{n}" for n in range(6)]
    data: dict[str, Any] = {
        "models": dict.fromkeys(names, "./x"),
        "merge": {
            "method": "linear",
            "sources": dict.fromkeys(names, 0.5),
            "slices": None,
            "rules": [{"match": "*", "weights": dict.fromkeys(names, 0.25)}],
        },
    }
    recipe = recipe_from_mapping(data).recipe
    text = dump_recipe(recipe)
    assert max(map(len, text.splitlines())) < 60
    assert parse_recipe(text).recipe == recipe


@pytest.mark.parametrize(
    "text",
    [
        *(
            "no",
            "Yes",
            "on",
            "null",
            "~",
            "true",
            "1",
            "1.5",
            "1e-5",
            "1e5",
            "0x1F",
            "0o17",
            "1_0",
            ".5",
            ".inf",
            "1:30",
        ),
        *(
            "-",
            "- a",
            "a: b",
            "a #b",
            "*a",
            "&a",
            "!a",
            "%a",
            "@a",
            "`a",
            "{a}",
            "[a]",
            "?",
            "=",
            "<<",
            "a,b",
            "---",
            "...",
        ),
        *('"a"', "'a'", " a", "a ", "a\nb", "a\tb", "a\\b", "\x7f", "\x85", "\u2028", "\ufeff", "é", "日本", "😀"),
        *("2001-12-14", "8-15"),
    ],
)
def test_awkward_text_stays_text(text: str) -> None:
    data = {
        "models": {"a": f"x{text}", "b": {"adapter": [text if text.strip() else "y", f"{text}x"]}},
        "merge": {"method": "m", "sources": ["a"], "params": {text: text, "list": [text, text]}},
    }
    recipe = recipe_from_mapping(data).recipe
    dumped = dump_recipe(recipe)
    assert parse_recipe(dumped).recipe == recipe
    by_another_reader = yaml.safe_load(dumped)["merge"]["params"]
    assert by_another_reader == {text: text, "list": [text, text]}


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
PATH = TEXT.filter(lambda text: text.strip() != "")
NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
NUMBER = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
WEIGHT = st.none() | NUMBER | st.lists(NUMBER, min_size=1, max_size=3)
LAYERS = (
    st.integers(0, 99)
    | st.builds(lambda first, more: f"{first}-{first + more}", st.integers(0, 50), st.integers(0, 50))
    | st.lists(st.integers(0, 99), min_size=1, max_size=3)
    | st.sampled_from(["none", "20-"])
)


def params(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    single = SCALAR | st.lists(SCALAR, min_size=1, max_size=3)
    return st.dictionaries(TEXT, single | st.dictionaries(st.sampled_from(names), single, min_size=1), max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAME, min_size=3, max_size=6, unique=True))
    steps = names[-2:] if draw(st.booleans()) or "merge" in names else ["merge"]
    models = [name for name in names if name not in steps]
    given: dict[str, Any] = {
        name: draw(PATH | st.fixed_dictionaries({"model": PATH}, optional={"adapter": PATH | st.lists(PATH)}))
        for name in models
    }
    known = list(models)
    graph: dict[str, Any] = {}
    for name in steps:
        sources = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
        rule = st.fixed_dictionaries(
            {"params": params(sources).filter(bool)},
            optional={
                "match": PATH | st.lists(PATH, min_size=1, max_size=2),
                "layers": LAYERS,
                "method": PATH,
                "weights": st.dictionaries(st.sampled_from(sources), WEIGHT)
                | st.lists(WEIGHT, min_size=len(sources), max_size=len(sources)),
            },
        )
        taking = st.fixed_dictionaries({"take": st.sampled_from(known)}, optional={"layers": LAYERS})
        graph[name] = draw(
            st.fixed_dictionaries(
                {"method": TEXT, "sources": st.just(sources) | st.fixed_dictionaries(dict.fromkeys(sources, WEIGHT))},
                optional={
                    "base": st.sampled_from(known),
                    "params": params(sources),
                    "like": TEXT,
                    "rules": st.lists(rule | taking, max_size=3),
                    "missing": st.sampled_from(["error", "present", "base"]),
                    "vocabulary": st.sampled_from(["error", "truncate"]),
                },
            )
        )
        known.append(name)
    output = st.fixed_dictionaries(
        {},
        optional={
            "from": st.sampled_from(known),
            "path": PATH,
            "dtype": st.sampled_from(["bfloat16", "F32", "torch.float16"]),
            "shard_size": st.integers(1, 10**15) | st.sampled_from(["5GB", "1.5 GiB"]),
            "config_from": st.sampled_from(models),
            "kind": st.sampled_from(["model", "task_vector"]),
            "push": st.fixed_dictionaries({"repo": PATH}, optional={"private": st.booleans(), "revision": TEXT}),
        },
    )
    return {"models": given, "steps": graph, "output": draw(output), "seed": draw(st.integers(0, 2**63 - 1))}


@given(recipes())
def test_what_is_dumped_reads_back(data: dict[str, Any]) -> None:
    recipe = recipe_from_mapping(data).recipe
    text = dump_recipe(recipe)
    again = parse_recipe(text).recipe
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1, 1.0 and True are equal to Python
    assert dump_recipe(again) == text


def test_convert_puts_differences_on_top() -> None:
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\ndtype: float16\n"
    loaded = parse_recipe(text)
    converted = convert_text(loaded)
    comments = [line for line in converted.splitlines() if line.startswith("#")]
    assert comments[:2] == ["# Translated from a mergekit config.", "# What differs in meaning:"]
    told = " ".join(line.removeprefix("#").strip() for line in comments)
    for difference in loaded.differences:
        assert f"- {difference}" in told
    assert parse_recipe(converted).recipe == loaded.recipe
    assert parse_recipe(converted).dialect == "pxmerge"


def test_convert_of_a_recipe_only_tidies() -> None:
    assert convert_text(parse_recipe(RECIPE)) == TIDY
