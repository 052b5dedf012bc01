"""Mappings of a mergekit config, and the keys in them that mergekit passes over.

Such keys mean nothing, there or here, unless they are slips of the pen: what is like a known key is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for, nearest
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, Place
from mergekit_px.recipe.mergekit.table import ALL_PARAMETERS

IdleKeys = dict[str, Place]
"""A sentence about each idle key, and where the key stands."""

_ADVICE = {"revision": "; write model@revision"}
"""What to do about keys that older releases of mergekit had."""


def entries_of(
    node: Node, what: str, known: Sequence[str] | None = None, idle: IdleKeys | None = None
) -> dict[str, Node]:
    """A mapping's entries, without those that are null.

    Args:
        known: the keys that mean something; None for any.
        idle: takes up all others; without it they are errors.

    Raises:
        RecipeError: not a mapping, or a key that is not known and no idle one.
    """
    if not isinstance(node.value, dict):
        raise RecipeError(f"{what} must be a mapping, not {shown(node.data())}", where=str(node.place))
    given = {key: child for key, child in node.value.items() if child.value is not None}
    if known is None:
        return given
    for key in node.value:
        if key not in known:
            _pass_over(key, node.keys[key], what, known, idle)
    return {key: child for key, child in given.items() if key in known}


def _pass_over(key: str, place: Place, what: str, known: Sequence[str], idle: IdleKeys | None) -> None:
    misplaced = key in ALL_PARAMETERS
    if idle is None or (not misplaced and nearest(key, known) is not None):
        raise RecipeError(f"unknown key '{key[:80]}' in {what}", where=str(place), hint=hint_for(key, known))
    advice = "; it belongs under 'parameters'" if misplaced else _ADVICE.get(key, "")
    idle.setdefault(f"'{key[:80]}' in {what} has no effect, there or here{advice}.", place)
