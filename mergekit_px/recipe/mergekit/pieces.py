"""The models and slices of a mergekit config."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_px.errors import RecipeError
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of
from mergekit_px.recipe.mergekit.references import Reference, read_reference


@dataclass(frozen=True, slots=True)
class Source:
    """A model that takes part in a slice, with layers [first, last] of it, both included; last < first is none."""

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


def read_models(node: Node, base: Reference | None, idle: IdleKeys) -> list[Piece]:
    """The one piece of a config with ``models``."""
    sources = []
    for item in _items(node, "'models'"):
        entries = entries_of(item, "an entry of 'models'", ("model", "parameters"), idle)
        sources.append(Source(_model(item, entries), item, entries.get("parameters")))
    return [Piece(node, _distinct(sources), base)]


def read_slices(node: Node, base: Reference | None, idle: IdleKeys) -> list[Piece]:
    """The pieces of a config with ``slices``."""
    pieces: list[Piece] = []
    first = 0
    for item in _items(node, "'slices'"):
        entries = entries_of(item, "a slice", ("sources", "base_model", "parameters", "residual_weight"), idle)
        if "sources" not in entries:
            raise RecipeError("a slice without 'sources'", where=str(item.place))
        sources = []
        for source in _items(entries["sources"], "'sources'"):
            inner = entries_of(source, "a source", ("model", "layer_range", "parameters"), idle)
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
        if not lengths[0]:
            what = "A slice whose 'layer_range' ends where it begins, or before, has no effect, there or here."
            idle.setdefault(what, item.place)
        first += lengths[0]
    if first == 0:
        raise RecipeError("the slices have no layers at all", where=str(node.place))
    return pieces


def _items(node: Node, what: str) -> list[Node]:
    if not isinstance(node.value, list):
        raise RecipeError(f"{what} must be a list, not {shown(node.data())}", where=str(node.place))
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
    return numbers[0], max(numbers[1], numbers[0]) - 1
