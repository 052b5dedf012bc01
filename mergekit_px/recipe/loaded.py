"""A checked recipe, with the text and the places that it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mergekit_px.located.places import Places
from mergekit_px.recipe.model import Recipe

Dialect = Literal["pxmerge", "mergekit"]


@dataclass(frozen=True, repr=False)
class LoadedRecipe:
    """A checked recipe, and what is known of where it came from.

    Attributes:
        recipe: what was asked.
        source: the text as given; where overrides changed it, the recipe as it then is.
        path: the file, if it came from one.
        differences: for a mergekit config, each difference in meaning, as a sentence.
        idle: of these, what is said of keys that mean nothing, each with where it stands.
        dialect: the form of the text.
        places: where each part stands.
    """

    recipe: Recipe
    source: str
    path: Path | None = None
    differences: tuple[str, ...] = ()
    idle: tuple[tuple[str, str], ...] = ()
    dialect: Dialect = "pxmerge"
    places: Places | None = field(default=None, repr=False, compare=False)

    def where(self, *keys: str | int) -> str:
        """The place of a key path of the recipe in what the user wrote, as ``recipe.yaml:12:5``.

        A path that the text does not have gets the place of its nearest parent; a recipe made in code has
        ``recipe`` for all places.
        """
        return self.places.key(keys) if self.places is not None else "recipe"

    def __repr__(self) -> str:
        name = self.path.name if self.path is not None else "in memory"
        return f"<LoadedRecipe {name}: {', '.join(self.recipe.models)} -> {', '.join(self.recipe.steps)}>"
