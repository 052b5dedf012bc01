"""Recipes drawn at random: each gives a plan, or one line that says what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from folders import write_llamas

import mergekit_px as px
from mergekit_px.methods import load_methods
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

COUNT = int(os.environ.get("PXMERGE_FUZZ_RECIPES", "150"))
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**70,
    1e400,
    "",
    "x",
    "*",
    "0-99",
    "a",
    [],
    [[]],
    {},
    {"a": None},
    "é\n\x1b[31m",
)
"""What nobody would write where it stands."""
RULES: tuple[dict[str, Any], ...] = (
    {"match": "lm_head.*", "take": "a"},
    {"match": "*norm*", "method": "linear"},
    {"layers": 0, "params": {}},
    {"layers": "0-1", "weights": {"a": 0.5}},
    {"match": "model.layers.*", "drop": True},
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llamas(folder, "a", "b")
    wide = tiny_llama_tensors(layers=3)
    write_checkpoint(folder / "deep", wide, config=tiny_llama_config(layers=3))
    return folder


def drawn(random: Random) -> dict[str, Any]:
    """A recipe that may well be right."""
    methods = load_methods()
    steps: dict[str, Any] = {}
    for number in range(random.choice((1, 1, 2))):
        name = random.choice(list(methods))
        method = methods[name]
        least, most = method.sources
        known = ["a", "b", *steps]
        sources = [known[place % len(known)] for place in range(max(least, min(most or 2, 2)))]
        step: dict[str, Any] = {"method": name, "sources": list(dict.fromkeys(sources))}
        if method.space == "deltas" or random.random() < 0.1:
            step["base"] = "base"
        if random.random() < 0.3:
            step["sources"] = {source: random.choice((0.5, 1, [0, 1])) for source in step["sources"]}
        if random.random() < 0.3:
            step["rules"] = [dict(rule) for rule in random.sample(RULES, 2)]
        if random.random() < 0.2:
            step["missing"] = random.choice(("present", "error", "base"))
        steps[f"step{number}"] = step
    used = {"base", "a", "b"} | ({"deep"} if random.random() < 0.1 else set())
    return {"pxmerge": 1, "models": {name: name for name in sorted(used)}, "steps": steps}


def damaged(random: Random, node: Any) -> None:
    """Put something odd at one place of it."""
    while isinstance(node, (dict, list)) and node:
        key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or random.random() < 0.2:
            if random.random() < 0.3 and isinstance(node, dict):
                node[random.choice(("weights", "base", "like", "stack", "params", "x"))] = random.choice(ODD)
            else:
                node[key] = random.choice(ODD)
            return
        node = node[key]


def test_a_recipe_gives_a_plan_or_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    random, planned = Random(0), 0
    for number in range(COUNT):
        recipe = drawn(random)
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            damaged(random, recipe)
        try:
            plan = px.plan_recipe(recipe, output="merged")
        except px.PxmergeError as error:
            assert str(error) and "\n" not in str(error), (number, recipe)
        except Exception as error:
            raise AssertionError((number, recipe)) from error
        else:
            planned += 1
            assert plan.items
    assert planned >= COUNT / 3
