"""``pxmerge schema``: the JSON Schema of recipes."""

from __future__ import annotations

import json

from mergekit_px.cli._output import Output


def schema() -> int:
    """Print the JSON Schema of recipes, for editors and other programs.

    An editor with the YAML language server completes and checks a recipe whose first line is
    "# yaml-language-server: $schema=./pxmerge-recipe.schema.json".

    \b
    Example:
      pxmerge schema > pxmerge-recipe.schema.json
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.schema import recipe_schema

    Output().raw(json.dumps(recipe_schema(method_catalog()), indent=2, ensure_ascii=False) + "\n")
    return 0
