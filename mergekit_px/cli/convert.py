"""``pxmerge convert``: a mergekit config as a recipe."""

from __future__ import annotations

from mergekit_px.cli._options import RecipeFile
from mergekit_px.cli._output import Output


def convert(recipe: RecipeFile) -> int:
    """Print a mergekit config as a pxmerge recipe, with every difference in meaning.

    The differences stand as comments at the top of the recipe. What cannot be kept is refused by name. A recipe in
    pxmerge's own form is printed tidily.

    \b
    Examples:
      pxmerge convert mergekit.yml
      pxmerge convert mergekit.yml > recipe.yaml
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.dump import convert_text
    from mergekit_px.recipe.load import load_recipe

    Output().raw(convert_text(load_recipe(recipe, methods=method_catalog())))
    return 0
