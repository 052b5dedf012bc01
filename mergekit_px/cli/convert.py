"""``pxmerge convert``: a mergekit config as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.cli._options import RecipeFile
from mergekit_px.cli._output import Output
from mergekit_px.errors import OutputError

File = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="A new file for it; printed if left out.")
]


def convert(recipe: RecipeFile, output: File = None) -> int:
    """Print a mergekit config as a pxmerge recipe, with every difference in meaning.

    The differences stand as comments at the top of the recipe. What cannot be kept is refused by name. A recipe in
    pxmerge's own form is printed tidily.

    \b
    Examples:
      pxmerge convert mergekit.yml
      pxmerge convert mergekit.yml -o recipe.yaml
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.dump import convert_text
    from mergekit_px.recipe.load import load_recipe

    text = convert_text(load_recipe(recipe, methods=method_catalog()))
    if output is None:
        Output().raw(text)
        return 0
    if output.exists():
        raise OutputError("the file is there already", where=str(output), hint="give another with -o, or remove it")
    with replacement(output) as file:
        file.write(text.encode())
    Output().text(str(output))
    return 0
