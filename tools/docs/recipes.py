"""The tables of docs/recipe.md: the keys of a recipe, from the models that check it."""

from __future__ import annotations

import json

from mergekit_px.cli.schema import json_schemas
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe import mixture, model
from mergekit_px.recipe.schema import recipe_schema
from tools.docs.fields import HEADER, field_rows
from tools.docs.markdown import table

_PARTS = (
    model.Recipe,
    model.ModelInput,
    model.Step,
    model.Rule,
    model.Slice,
    model.SliceSource,
    mixture.Mixture,
    mixture.Expert,
    mixture.Router,
    mixture.ExpertChoice,
    model.Tokenizer,
    model.TokenRow,
    model.Output,
    model.Push,
)


def key_tables() -> dict[str, str]:
    """For each part of a recipe, by its name, a table of its keys."""
    return {f"keys of {part.__name__}": table(HEADER, field_rows(part)) for part in _PARTS}


def schema_file() -> str:
    return json.dumps(recipe_schema(method_catalog()), indent=2, ensure_ascii=False) + "\n"


def output_schema_file() -> str:
    """What commands print with ``--json``."""
    return json.dumps(json_schemas(), indent=1, ensure_ascii=False) + "\n"
