"""Where each part of a recipe stands in what the user wrote."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_px.located.yaml_text import Node

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Places:
    """Finds the place of a key path; of its nearest parent where the text does not have it."""

    root: Node

    def key(self, path: Path) -> str:
        """The place of the last key of a path (of the value, where that is an entry of a list)."""
        place = self.root.place
        for parent, key, child in self._walk(path):
            place = parent.keys.get(key, child.place) if isinstance(key, str) else child.place
        return str(place)

    def value(self, path: Path) -> str:
        """The place of the value at a path."""
        place = self.root.place
        for _, _, child in self._walk(path):
            place = child.place
        return str(place)

    def _walk(self, path: Path) -> list[tuple[Node, str | int, Node]]:
        """(parent, key, child) along a path, as far as it goes."""
        node, steps = self.root, []
        for key in path:
            child: Node | None = None
            if isinstance(node.value, dict) and isinstance(key, str):
                child = node.value.get(key)
            elif isinstance(node.value, list) and isinstance(key, int) and 0 <= key < len(node.value):
                child = node.value[key]
            if child is None:
                break
            steps.append((node, key, child))
            node = child
        return steps
