"""``pxmerge run``: carry out a recipe."""

from __future__ import annotations

from mergekit_px.cli._merge import merge_file
from mergekit_px.cli._options import RecipeFile, RunOptions


def run(recipe: RecipeFile, options: RunOptions) -> int:
    """Carry out a recipe and write the merged model.

    The output folder gets the weights, the edited config, the tokenizer and other side files, a model card, the
    recipe and a lock file with the hash of every file. Equal inputs give equal bytes on every run. The folder's name
    is printed on stdout when all is done.

    A run that was interrupted goes on with --resume, and the result is the same to the byte.

    \b
    Examples:
      pxmerge run recipe.yaml
      pxmerge run recipe.yaml -o ./merged --memory 4GB
      pxmerge run recipe.yaml --set merge.params.density=0.3 output.dtype=float32
      pxmerge run mergekit.yml --resume
    """
    return merge_file(recipe, options)
