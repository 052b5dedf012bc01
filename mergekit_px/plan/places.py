"""Where tensors stand in a model: stack, module, layer and expert, told from their names for grids of measures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mergekit_px.plan.layers import split_layer

_KINDS = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Place:
    """A cell of a grid: ``mlp.up_proj`` of layer 7 in the stack ``model.layers``.

    The experts of a layer share a place; ``layer`` is None outside the numbered layers.
    """

    stack: str
    module: str
    layer: int | None


def place_of(name: str) -> Place:
    """The place of a tensor; the weight and the bias of a module share one."""
    found = split_layer(name)
    if found is None:
        return Place("", _module(name), None)
    return Place(found.stack.rstrip("."), _module(found.suffix.lstrip(".")) or found.stack.rstrip("."), found.layer)


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor belongs to; None where names do not number experts."""
    words = name.split(".")
    return next((int(word) for before, word in pairwise(words) if _is_expert(before, word)), None)


def _module(suffix: str) -> str:
    for kind in _KINDS:
        suffix = suffix.removesuffix(kind)
    words = suffix.split(".")
    return ".".join(
        "*" if number and _is_expert(words[number - 1], word) else word for number, word in enumerate(words)
    )


def _is_expert(before: str, word: str) -> bool:
    return "expert" in before and word.isdecimal()
