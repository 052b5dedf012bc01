"""Layer numbers, depth, and places in grids of measures, read from tensor names alone.

A *stack* is a numbered list of layers: ``model.layers.`` in ``model.layers.7.mlp.experts.3.up_proj.weight``. The
layer is the first component of the name that is a number; later numbers (experts, sub-blocks) are part of the
suffix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_DERIVED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "attn.masked_bias", "embeddings.position_ids")
_EMBEDDING_MARKS = ("embed", "wte", "wpe", "cls_token", "patch_", "position")


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor name cut at its layer number: ``stack + str(layer) + suffix``."""

    stack: str
    layer: int
    suffix: str

    def renumbered(self, layer: int) -> str:
        return f"{self.stack}{layer}{self.suffix}"


@lru_cache(maxsize=200_000)
def split_layer(name: str) -> LayerName | None:
    """The name cut at its layer number; None for a tensor outside the numbered layers."""
    start = 0
    for component in name.split("."):
        if component.isdecimal() and component.isascii():
            return LayerName(name[:start], int(component), name[start + len(component) :])
        start += len(component) + 1
    return None


def stack_sizes(names: Iterable[str]) -> Mapping[str, int]:
    """Number of layers of each stack: the highest layer number plus one."""
    sizes: dict[str, int] = {}
    for name in names:
        if (found := split_layer(name)) is not None:
            sizes[found.stack] = max(sizes.get(found.stack, 0), found.layer + 1)
    return sizes


def is_embedding(name: str) -> bool:
    """Whether a tensor outside the layers stands before the first layer rather than after the last."""
    return any(mark in name for mark in _EMBEDDING_MARKS)


def is_derived(name: str) -> bool:
    """Whether a tensor is a buffer that libraries compute from the config; only their older versions stored it."""
    return name.endswith(_DERIVED)


def depth(name: str, sizes: Mapping[str, int]) -> float:
    """Position of a tensor between the first layer (0) and the last (1).

    Outside the numbered layers embeddings are at 0 and everything else (final norm, head) at 1; a stack of one
    layer is at 1.
    """
    found = split_layer(name)
    if found is None:
        return 0.0 if is_embedding(name) else 1.0
    return position(found.layer, sizes[found.stack])


def position(index: int, count: int) -> float:
    """Position of one of ``count`` layers: 0 for the first, 1 for the last."""
    return index / (count - 1) if count > 1 else 1.0


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
