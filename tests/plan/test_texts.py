"""The texts beside the weights: written as they were read, or refused before the merge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mergekit_px.errors import PlanError
from mergekit_px.plan.texts import config_text, recipe_text
from mergekit_px.recipe.load import recipe_from_mapping


def test_half_a_character_is_written_as_the_escape_it_was() -> None:
    config = json.loads('{"note": "\\ud800", "name": "größe"}')
    written = config_text(config)
    assert json.loads(written) == config
    assert b"\\ud800" in written and "größe".encode() in written


def test_names_that_are_not_utf8_are_refused_with_their_line() -> None:
    merge = {"method": "linear", "sources": ["a"]}
    loaded = recipe_from_mapping({"pxmerge": 1, "models": {"a": "m"}, "merge": merge, "output": {"path": "o"}})
    assert recipe_text(loaded).decode() == loaded.source
    broken = replace(loaded, source="pxmerge: 1\nmodels: {a: n\udcff}\n")
    with pytest.raises(PlanError, match=r"not UTF-8.*models: \{a: n"):
        recipe_text(broken)
