"""``pxmerge moe build``: a mixture of experts of dense models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.cli._merge import merge
from mergekit_px.cli._options import RecipeFile, RunOptions
from mergekit_px.cli._output import output_for
from mergekit_px.errors import RecipeError

if TYPE_CHECKING:
    from mergekit_px.recipe.loaded import LoadedRecipe

_ROUTERS = "routers"


def build(recipe: RecipeFile, options: RunOptions) -> int:
    """Build a mixture of experts of dense models of one shape.

    The recipe has a step with a `mixture`: its experts take the place of the MLPs, and everything else is made by the
    step's method of its sources. Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek and Granite layouts; what the source's own
    type fits is taken. mergekit-moe's files are read too. Rows of routers that prompts make are written first, to
    OUTPUT.routers.safetensors, which the merge reads like any model.

    \b
    Examples:
      pxmerge moe build recipe.yaml -o ./mixture
      pxmerge moe build recipe.yaml --set merge.mixture.router=random --dry-run
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides=options.overrides(), methods=method_catalog())
    steps = [name for name, step in loaded.recipe.steps.items() if step.mixture is not None]
    if not steps:
        hint = "give a step a `mixture`, or run the recipe by `pxmerge run`"
        raise RecipeError("no step of the recipe builds a mixture of experts", where=loaded.where("steps"), hint=hint)
    for name in steps:
        loaded = _with_routers(loaded, name, options)
    return merge(loaded, options)


def _with_routers(loaded: LoadedRecipe, name: str, options: RunOptions) -> LoadedRecipe:
    """The recipe with rows from a file, which is written here, in the place of prompts."""
    from mergekit_px.recipe.dump import dump_recipe
    from mergekit_px.recipe.mixture import FROM_PROMPTS, Router
    from mergekit_px.recipe.model import ModelInput

    recipe = loaded.recipe
    step = recipe.steps[name]
    mixture = step.mixture
    if mixture is None or mixture.router.kind not in FROM_PROMPTS:
        return loaded
    output = output_for(json=options.json, quiet=options.quiet)
    path = Path(f"{options.output or recipe.output.path}".rstrip("/")).expanduser()
    path = path.with_name(f"{path.name}.{_ROUTERS}.safetensors")
    router, models = Router(kind="zero"), recipe.models
    if options.dry_run:
        output.note(f"note: a run would read the prompts and write {path}; zeros stand for its rows here")
    else:
        from mergekit_px.learn.routers import write_routers

        write_routers(
            path,
            _reader(loaded, name),
            mixture,
            overwrite=options.overwrite or options.resume,
            allow_pickle=options.allow_pickle,
            note=lambda line: output.note(f"note: {line}"),
        )
        own = _ROUTERS if _ROUTERS not in {*models, *recipe.steps} else f"{name}-{_ROUTERS}"
        router, models = Router(kind="file", model=own), {**models, own: ModelInput(model=str(path))}
    changed = step.model_copy(update={"mixture": mixture.model_copy(update={"router": router})})
    recipe = recipe.model_copy(update={"models": models, "steps": {**recipe.steps, name: changed}})
    return replace(loaded, recipe=recipe, source=dump_recipe(recipe))


def _reader(loaded: LoadedRecipe, name: str) -> str:
    """The model that reads the prompts: the step's base or first source, which has its layers."""
    recipe = loaded.recipe
    while name in recipe.steps:
        step = recipe.steps[name]
        if step.slices is not None:
            hint = "run that step first, and build the mixture of its result"
            raise RecipeError("prompts are read by a whole model, not by layers that a step stacks",
                              where=loaded.where("steps", name, "slices"), hint=hint)  # fmt: skip
        name = step.base or step.source_names()[0]
    entry = recipe.models[name]
    if entry.model is None or entry.adapter is not None or entry.rename or entry.component is not None:
        hint = "give it merged, as a model of its own"
        raise RecipeError(f"prompts are read by a plain model, and '{name}' is changed on reading",
                          where=loaded.where("models", name), hint=hint)  # fmt: skip
    return entry.model
