"""``pxmerge adapter apply``: a base model with adapters in it."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli.adapter_inputs import AdapterOptions, AdapterPaths, BaseModel
from mergekit_px.recipe.naming import model_names


def apply(base: BaseModel, adapters: AdapterPaths, binding: AdapterOptions, options: RunOptions) -> int:
    """Put adapters into a base model: the model that is written needs no adapter any more.

    Several adapters are applied in the order given, each to what the one before left. The tensors are streamed, and
    each is rounded once, to the dtype it is stored in. Every tensor of an adapter takes part, or the command fails.

    The same in a recipe is {model: BASE, adapter: [ADAPTER, ...]}, with component and the like beside them.

    \b
    Examples:
      pxmerge adapter apply ./base ./math-lora -o ./math
      pxmerge adapter apply org/base org/style-lora ./math-lora --dtype bfloat16 --memory 2GB
    """
    return apply_adapters(base, adapters, binding, options)


def apply_adapters(base: str, adapters: Sequence[str], binding: AdapterOptions, options: RunOptions) -> int:
    """Run the recipe of ``pxmerge adapter apply``."""
    (name,) = model_names([base])
    recipe = {
        "pxmerge": 1,
        "models": {name: {"model": base, "adapter": list(adapters), **binding.chosen()}},
        "merge": {"method": "passthrough", "sources": [name]},
    }
    return merge_mapping(recipe, options)
