"""``--set key=value``: changes to a recipe before it is read.

A key is a path with dots, ``steps.mixed.params.density``; entries of lists go by number,
``models.0.parameters.weight``, and a source by its name, which sets its weight. Names that themselves contain dots are
written as they are. A value is a YAML scalar or a flow collection; nothing after the ``=`` takes the value away. Fields
may be set whether or not the text has them; models, steps, sources and list entries must exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path
from mergekit_px.located.yaml_text import Node, Place, mapping, parse_yaml, sequence


class FlagOverride(str):
    """A change for which there is a flag of its own, which is what errors name.

    Attributes:
        flag: as the user typed it.
    """

    flag: str

    def __new__(cls, text: str, flag: str) -> FlagOverride:
        override = super().__new__(cls, text)
        override.flag = flag
        return override


def apply_overrides(root: Node, overrides: Sequence[str]) -> Node:
    """A changed copy of the tree; what an override put there has ``--set key=value`` for its place.

    Raises:
        RecipeError: not ``key=value``, a value that is no YAML, a path that leads nowhere.
    """
    for override in overrides:
        origin = override.flag if isinstance(override, FlagOverride) else f"--set {override}"
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError("not key=value", where=origin, hint="write for example --set output.dtype=float32")
        if parts[:2] == ["steps", "merge"] and isinstance(root.value, dict) and "steps" not in root.value:
            parts = parts[1:]
        root = _replaced(root, parts, parse_yaml(text, origin, located=False), Place(origin), ())
    return root


def _replaced(node: Node, parts: list[str], value: Node, place: Place, above: Path) -> Node:
    if not parts:
        return value
    if isinstance(node.value, str) and len(above) == 2 and above[0] == "models":
        node = mapping(node.place, {"model": node})
    if isinstance(node.value, list) and _holds_names(above) and not parts[0].isdecimal():
        node = _by_name(node)
    if isinstance(node.value, dict):
        name, rest = _split_name(parts, node.value)
        if name not in node.value and _holds_names(above):
            what = f"{_dotted(above)} has no '{name}'"
            raise RecipeError(what, where=str(place), hint=hint_for(name, node.value))
        child = node.value.get(name) or Node({}, place)
        changed = _replaced(child, rest, value, place, (*above, name))
        return mapping(node.place, {**node.value, name: changed}, {**node.keys, name: place})
    if isinstance(node.value, list):
        index = _index(parts[0], len(node.value), place, above)
        entries = list(node.value)
        entries[index] = _replaced(entries[index], parts[1:], value, place, (*above, index))
        return sequence(node.place, entries)
    raise RecipeError(f"{_dotted(above)} is a single value and has no '{parts[0]}'", where=str(place))


def _split_name(parts: list[str], entries: dict[str, Node]) -> tuple[str, list[str]]:
    """The longest run of parts that is a key as it stands (a name may contain dots), and what follows it."""
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in entries:
            return name, parts[length:]
    return parts[0], parts[1:]


def _by_name(names: Node) -> Node:
    """A list of sources as the mapping that means the same: each name with the weight that its method gives it."""
    assert isinstance(names.value, list)
    if not all(isinstance(entry.value, str) for entry in names.value):
        return names
    return mapping(names.place, {str(entry.value): Node(None, entry.place) for entry in names.value})


def _holds_names(path: Path) -> bool:
    """Whether the keys under a path are names of the user's choice, where a new one would be a slip."""
    return path in (("models",), ("steps",)) or (path[-1:] == ("sources",) and path[0] in ("steps", "merge"))


def _index(text: str, count: int, place: Place, above: Path) -> int:
    if text.isdecimal() and len(text) < 10 and int(text) < count:
        return int(text)
    known = f"entries 0 to {count - 1}" if count else "no entries"
    raise RecipeError(f"{_dotted(above)} is a list with {known}, not '{text}'", where=str(place))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the recipe"
