"""Layers by number, as recipes write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_px.errors import RecipeError

HIGHEST = 1_000_000
"""No layer number is above this: a slip of the keyboard must not become a list that fills the memory."""

_RANGE = re.compile(r"(\d+)\s*-\s*(\d*)", re.ASCII)
_HINT = "write 7, '8-15' (both ends included), [0, 5, 9], '20-' for the rest, or 'none' for tensors outside the layers"


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """Parts in the order written, each (first, last) with both ends included; last is None for "to the end".

    No parts at all selects the tensors outside the numbered layers.
    """

    parts: tuple[tuple[int, int | None], ...]

    def contains(self, layer: int | None) -> bool:
        """Whether a layer is selected; ``None`` stands for a tensor outside the numbered layers."""
        if layer is None:
            return not self.parts
        return any(first <= layer and (last is None or layer <= last) for first, last in self.parts)

    def length(self) -> int | None:
        """The number of layers, or None where it depends on the model."""
        total = 0
        for first, last in self.parts:
            if last is None:
                return None
            total += last - first + 1
        return total

    def to_list(self, count: int) -> list[int]:
        """The layers in the order written, for a model of ``count`` layers. Those it lacks are not left out."""
        layers: list[int] = []
        for first, last in self.parts:
            layers.extend(range(first, (count - 1 if last is None else last) + 1))
        return layers


def parse_layers(value: str | int | list[int], *, where: str | None = None) -> LayerSelection:
    """Read a layer range; ``where`` is the place that errors name.

    Raises:
        RecipeError: not a layer range.
    """
    if isinstance(value, list):
        if not value:
            raise RecipeError("an empty list selects no layer", where=where, hint=_HINT)
        return LayerSelection(tuple(_part(item, where) for item in value))
    if value == "none":
        return LayerSelection(())
    return LayerSelection((_part(value, where),))


def _part(value: str | int, where: str | None) -> tuple[int, int | None]:
    first: int
    last: int | None
    if isinstance(value, int) and not isinstance(value, bool):
        first, last = value, value
    elif isinstance(value, str) and (text := value.strip()).isdecimal() and text.isascii() and len(text) < 10:
        first = last = int(text)
    elif isinstance(value, str) and len(value) < 40 and (match := _RANGE.fullmatch(value.strip())):
        first, last = int(match[1]), int(match[2]) if match[2] else None
    else:
        raise RecipeError(f"{_shown(value)} is not a layer range", where=where, hint=_HINT)
    if first < 0 or max(first, last or 0) > HIGHEST:
        raise RecipeError(f"{_shown(value)}: layers are counted from 0 to {HIGHEST}", where=where)
    if last is not None and last < first:
        raise RecipeError(f"{_shown(value)} ends before it begins", where=where, hint=f"write '{last}-{first}'")
    return first, last


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
