"""The texts beside the weights, made while planning: what cannot be written is not found only after the merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergekit_px.errors import PlanError
from mergekit_px.recipe.loaded import LoadedRecipe


def config_text(config: Mapping[str, Any]) -> bytes:
    """``config.json``. Raises ``PlanError``."""
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    except (RecursionError, TypeError, ValueError) as error:
        raise PlanError(f"config.json of the output cannot be written: {error}") from None
    # Half a character, which only an escape can stand for, is written as the escape that it was read from.
    return text.encode("utf-8", "backslashreplace")


def recipe_text(loaded: LoadedRecipe) -> bytes:
    """``pxmerge.yaml``, in UTF-8. Raises ``PlanError`` for names that are not."""
    from mergekit_px.recipe.dump import dump_recipe

    text = loaded.source or dump_recipe(loaded.recipe)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].rpartition("\n")[2] + text[error.start :].partition("\n")[0]
        raise PlanError(
            f"the recipe holds a name that is not UTF-8, so it cannot be written beside the weights: {line.strip()}",
            where=loaded.where(),
            hint="rename the file or folder",
        ) from None
