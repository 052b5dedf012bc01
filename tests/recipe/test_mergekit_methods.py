"""Every method of mergekit, as mergekit itself lists them on the page of comparisons, has an equal here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_px.methods import load_methods
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.mergekit.table import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "mergekit.md"
TABLE = PAGE.read_text(encoding="utf-8").split("<!-- methods -->")[1].split("<!-- end of methods -->")[0]
PEER_METHODS = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)


def test_the_list_is_read() -> None:
    assert {"linear", "slerp", "ties"} < set(PEER_METHODS)


@pytest.mark.parametrize("name", PEER_METHODS)
def test_a_config_of_each_method_is_translated(name: str) -> None:
    assert name in METHODS, f"mergekit's {name} is refused" + (", and it exists here" if name in load_methods() else "")
    method = METHODS[name]
    count = method.sources or 2
    sources = [f"{{model: {letter}, parameters: {{weight: 1}}}}" for letter in "xyz"[:count]]
    base = "" if method.base == "ignored" else "base_model: x\n" if method.base == "end" else "base_model: b\n"
    text = f"merge_method: {name}\n{base}models: [{', '.join(sources)}]\nparameters: {{t: 0.5}}\n"
    loaded = parse_recipe(text, methods=method_catalog())
    assert loaded.recipe.steps["merge"].method in load_methods()


def test_every_parameter_of_a_method_has_a_place_here() -> None:
    methods = load_methods()
    for method in METHODS.values():
        for target in (method.target or method.name, method.on_deltas):
            if target is None:
                continue
            fields = methods[target].params.model_fields
            missing = {p.target for p in method.parameters.values()} - fields.keys() - {"", "weight"}
            assert not missing, f"{target} has no {missing}"
