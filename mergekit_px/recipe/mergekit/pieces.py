"""The models and slices of a mergekit config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node
from mergekit_px.recipe.mergekit.references import Reference, read_reference


@dataclass(frozen=True, slots=True)
class Source:
    """A model that takes part in a slice, with layers [first, last] of it, both included."""

    reference: Reference
    node: Node
    parameters: Node | None = None
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice; a config with ``models`` is one piece, without layers.

    ``first`` is the number of its first layer in the output.
    """

    node: Node
    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Node | None = None
    first: int = 0
    residual_weight: bool = False


def entries_of(node: Node, what: str, known: Sequence[str] | None = None) -> dict[str, Node]:
    """A mapping's entries, without those that are null.

    Raises:
        RecipeError: not a mapping, or a key that is not among ``known``.
    """
    if not isinstance(node.value, dict):
        raise RecipeError(f"{what} must be a mapping, not {shown(node.value)}", where=str(node.place))
    for key in node.value:
        if known is not None and key not in known:
            where = str(node.keys[key])
            raise RecipeError(f"unknown key '{key[:80]}' in {what}", where=where, hint=hint_for(key, known))
    return {key: child for key, child in node.value.items() if child.value is not None}


def read_models(node: Node, base: Reference | None) -> list[Piece]:
    """The one piece of a config with ``models``."""
    sources = []
    for item in _items(node, "'models'"):
        entries = entries_of(item, "an entry of 'models'", ("model", "parameters"))
        sources.append(Source(_model(item, entries), item, entries.get("parameters")))
    return [Piece(node, _distinct(sources), base)]


def read_slices(node: Node, base: Reference | None) -> list[Piece]:
    """The pieces of a config with ``slices``."""
    pieces: list[Piece] = []
    first = 0
    for item in _items(node, "'slices'"):
        entries = entries_of(item, "a slice", ("sources", "base_model", "parameters", "residual_weight"))
        if "sources" not in entries:
            raise RecipeError("a slice without 'sources'", where=str(item.place))
        sources = []
        for source in _items(entries["sources"], "'sources'"):
            inner = entries_of(source, "a source", ("model", "layer_range", "parameters"))
            reference = _model(source, inner)
            if "layer_range" not in inner:
                raise RecipeError("'layer_range' is missing", where=str(source.place))
            sources.append(Source(reference, source, inner.get("parameters"), _layers(inner["layer_range"])))
        own_base = read_reference(entries["base_model"]) if "base_model" in entries else base
        lengths = [last - start + 1 for start, last in (source.layers or (0, 0) for source in sources)]
        if len(set(lengths)) > 1:
            what = f"the sources of a slice must have as many layers each, not {', '.join(map(str, lengths))}"
            raise RecipeError(what, where=str(item.place))
        pieces.append(
            Piece(item, _distinct(sources), own_base, entries.get("parameters"), first, "residual_weight" in entries)
        )
        first += lengths[0]
    return pieces


def _items(node: Node, what: str) -> list[Node]:
    if not isinstance(node.value, list):
        raise RecipeError(f"{what} must be a list, not {shown(node.value)}", where=str(node.place))
    if not node.value:
        raise RecipeError(f"{what} is empty", where=str(node.place))
    return node.value


def _model(node: Node, entries: dict[str, Node]) -> Reference:
    if "model" not in entries:
        raise RecipeError("'model' is missing", where=str(node.place))
    return read_reference(entries["model"])


def _distinct(sources: list[Source]) -> tuple[Source, ...]:
    seen: set[Reference] = set()
    for source in sources:
        if source.reference in seen:
            raise RecipeError(f"model '{source.reference}' is given twice", where=str(source.node.place))
        seen.add(source.reference)
    return tuple(sources)


def _layers(node: Node) -> tuple[int, int]:
    values = [item.value for item in node.value] if isinstance(node.value, list) else []
    numbers = [int(text) for text in map(str, values) if text.isascii() and text.isdecimal() and len(text) < 8]
    if len(values) != 2 or len(numbers) != 2:
        what = f"'layer_range' must be [first, end] with the end left out, not {shown(node.data())}"
        raise RecipeError(what, where=str(node.place))
    if numbers[1] <= numbers[0]:
        raise RecipeError(f"'layer_range' {numbers} has no layers", where=str(node.place))
    return numbers[0], numbers[1] - 1
