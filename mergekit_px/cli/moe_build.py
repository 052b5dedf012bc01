"""``pxmerge moe build``: a mixture of experts of dense models."""

from __future__ import annotations

from mergekit_px.cli._merge import merge
from mergekit_px.cli._options import RecipeFile, RunOptions
from mergekit_px.errors import RecipeError


def build(recipe: RecipeFile, options: RunOptions) -> int:
    """Build a mixture of experts of dense models of one shape.

    The recipe has a step with a `mixture`: its experts take the place of the MLPs, and everything else is made by the
    step's method of its sources. Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek and Granite layouts; what the source's own
    type fits is taken. mergekit-moe's files are read too.

    \b
    Examples:
      pxmerge moe build recipe.yaml -o ./mixture
      pxmerge moe build recipe.yaml --set merge.mixture.router=random --dry-run
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides=options.overrides(), methods=method_catalog())
    if not any(step.mixture is not None for step in loaded.recipe.steps.values()):
        hint = "give a step a `mixture`, or carry the recipe out by `pxmerge run`"
        raise RecipeError("no step of the recipe builds a mixture of experts", where=loaded.where("steps"), hint=hint)
    return merge(loaded, options)
