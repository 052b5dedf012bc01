"""A translated mergekit config means for every tensor what it means to mergekit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peer_meaning import LAYERS, peer_meaning, recipe_meaning

from mergekit_px.errors import RecipeError
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import recipe_from_mapping

NUMBER = st.integers(0, 20).map(lambda n: n / 20)
VALUE = NUMBER | st.lists(NUMBER, min_size=1, max_size=5)
FILTER = st.sampled_from(
    ["self_attn", "mlp", "norm", "embed", "lm_head", "model", "layers.1.", "proj", "e", "[x]", "*"]
)
CONDITION = st.fixed_dictionaries({"value": VALUE}, optional={"filter": FILTER})
SETTING = VALUE | CONDITION | st.lists(CONDITION, min_size=1, max_size=3)
COMPLETE = VALUE | st.builds(lambda some, last: [*some, {"value": last}], st.lists(CONDITION, max_size=2), VALUE)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(["slerp", "ties"]))
    config: dict[str, Any] = {"merge_method": method, "base_model": "base", "dtype": "float32"}
    shared = {"t": SETTING} if method == "slerp" else {"lambda": SETTING, "density": SETTING, "weight": SETTING}
    own = {} if method == "slerp" else {"density": SETTING, "weight": SETTING}

    def parameters(settings: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
        chosen = draw(st.fixed_dictionaries({}, optional=settings))
        return {**part, "parameters": chosen} if chosen else part

    def entries() -> list[dict[str, Any]]:
        others = ["one"] if method == "slerp" else draw(st.lists(st.sampled_from(["one", "two", "three"]), min_size=1))
        names = draw(st.permutations(["base", *dict.fromkeys(others)]))
        return [parameters(own, {"model": name}) for name in names]

    if draw(st.booleans()):
        config["models"] = entries()
        if draw(st.booleans()):
            config["models"] = [entry for entry in config["models"] if entry["model"] != "base"]
    else:
        config["slices"] = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, LAYERS))
            sources = entries()
            for source in sources:
                first = draw(st.integers(0, LAYERS - length))
                source["layer_range"] = [first, first + length]
            config["slices"].append(parameters(shared, {"sources": sources}))
    needed = draw(COMPLETE)
    return {**parameters(shared, config), "parameters": {**config.get("parameters", {}), _required(method): needed}}


def _required(method: str) -> str:
    return "t" if method == "slerp" else "weight"


@given(configs())
@settings(max_examples=200)
def test_every_tensor_gets_the_same_values(config: dict[str, Any]) -> None:
    try:
        loaded = recipe_from_mapping(config, method_catalog())
    except RecipeError as error:
        assert "layers that change their number" in str(error)
        event("refused")
        return
    ours, theirs = recipe_meaning(loaded.recipe), peer_meaning(config)
    assert ours.keys() == theirs.keys()
    for name, meaning in theirs.items():
        assert ours[name]["params"] == pytest.approx(meaning["params"], abs=1e-12), name
        assert ours[name]["sources"].keys() == meaning["sources"].keys()
        for source, (stored, weight, density) in meaning["sources"].items():
            assert ours[name]["sources"][source][0] == stored
            assert ours[name]["sources"][source][1:] == pytest.approx((weight, density), abs=1e-12), (name, source)


def test_the_ends_of_slerp_are_in_order() -> None:
    for models in (["base", "one"], ["one", "base"], ["one"]):
        config = {
            "merge_method": "slerp",
            "base_model": "base",
            "models": [{"model": name} for name in models],
            "parameters": {"t": 0.1},
        }
        assert recipe_from_mapping(config).recipe.steps["merge"].sources == ["base", "one"]
