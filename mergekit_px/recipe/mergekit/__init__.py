"""mergekit's YAML as a pxmerge recipe of the same meaning."""

from __future__ import annotations

from mergekit_px.recipe.mergekit.differences import advice
from mergekit_px.recipe.mergekit.translate import Translation, translate

__all__ = ["Translation", "advice", "translate"]
